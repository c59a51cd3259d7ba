"""What a server proposes and a client's operator accepts, once."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from fedpeft.config import RunConfig
from fedpeft.privacy import Plan, make_plan


@dataclass(frozen=True)
class Proposal:
    """A run, as the server describes it to a client that connects.

    Attributes:
        run: the run's id.
        toml: the configuration, resolved.
        backbone: fingerprint of the frozen model.
    """

    run: str
    toml: str
    backbone: str

    @cached_property
    def config(self) -> RunConfig:
        """The configuration, checked.

        Raises:
            ConfigError: if the text is none.
        """
        return RunConfig.from_toml(self.toml)

    @cached_property
    def plan(self) -> Plan | None:
        """What the client works out of the configuration by itself."""
        return make_plan(self.config)

    @cached_property
    def hash(self) -> str:
        """32 hex digits of what is accepted: configuration, plan and backbone.

        Not the run: the ledger's budget holds over all runs of a plan together.
        """
        plan_hash = self.plan.hash if self.plan else ""
        key = [self.config.hash, plan_hash, self.backbone]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
