"""What a server proposes and a client's operator accepts, once."""

import hashlib
import json
import math
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from client.settings import LimitsSection
from fedpeft.config import RunConfig
from fedpeft.durable import write_atomically
from fedpeft.errors import RunError
from fedpeft.privacy import Plan, make_plan

_WITHDRAWAL = (
    "#\n# To withdraw consent: stop the client, delete this file, and take the hash\n"
    "# out of [client] accept if it stands there. What was released stays released.\n"
    "\n"
)


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
        """sha256, in hex, of what is accepted: configuration, plan and backbone.

        Not the run: the ledger's budget holds over all runs of a plan together.
        """
        plan_hash = self.plan.hash if self.plan else ""
        key = [self.config.hash, plan_hash, self.backbone]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def budget_in_force(config: RunConfig, limit: float | None) -> float:
    """Returns the epsilon that a client's data may release over all runs.

    The tighter one of the plan's and the client's own; infinite for a run that claims
    no privacy, where the client sets none.
    """
    privacy = config.privacy
    granted = privacy.budget_epsilon or privacy.target_epsilon
    own = math.inf if limit is None else limit
    return min(granted if config.is_private else math.inf, own)


def check_limits(proposal: Proposal, limits: LimitsSection) -> None:
    """Refuses a plan that takes more than this client ever grants.

    Raises:
        RunError: names the limit and what came.
    """
    privacy = proposal.config.privacy
    if privacy.unit not in limits.units:
        allowed = ", ".join(limits.units) or "none at all"
        raise _beyond("units", f"a plan of unit {allowed}", repr(privacy.unit))
    if proposal.plan and privacy.noise == "seeded" and not limits.seeded_noise:
        raise RunError(
            "The server's plan is beyond [limits] seeded_noise: expected secure noise, "
            "got 'seeded': whoever knows the seed can remove the noise; set [limits] "
            "seeded_noise = true for a rehearsal. Nothing was trained."
        )
    plan = proposal.plan
    epsilon = plan.target_epsilon if plan else math.inf
    if limits.max_epsilon is not None and epsilon > limits.max_epsilon:
        wanted = f"epsilon of at most {limits.max_epsilon:g} a run"
        raise _beyond("max_epsilon", wanted, f"{epsilon:g}")
    delta = plan.target_delta if plan else 1.0
    if limits.max_delta is not None and delta > limits.max_delta:
        wanted = f"delta of at most {limits.max_delta:g}"
        raise _beyond("max_delta", wanted, f"{delta:g}")
    planned = plan.planned_epsilon if plan else math.inf
    if limits.budget_epsilon is not None and planned > limits.budget_epsilon:
        wanted = f"a run within {limits.budget_epsilon:g} over all runs"
        raise _beyond("budget_epsilon", wanted, f"one of {planned:g}")


def _beyond(limit: str, wanted: str, got: str) -> RunError:
    return RunError(
        f"The server's plan is beyond [limits] {limit}: expected {wanted}, got {got}. "
        "Nothing was trained; talk to the server's operator."
    )


class AcceptedPlans:
    """The plans that this client's operator has read and accepted.

    One file a plan, never overwritten: the configuration, under its terms as they were
    shown. To withdraw consent, its operator stops the client, deletes the file and
    takes the hash out of the settings.

    Args:
        state: the client's state directory.
    """

    def __init__(self, state: Path) -> None:
        self._folder = state / "accepted"

    def holds(self, hash_: str) -> bool:
        """Whether a plan was accepted."""
        return self._path(hash_).is_file()

    def accept(self, proposal: Proposal, terms: list[tuple[str, str]]) -> None:
        """Writes a plan down, durably; one that is there stays as it is.

        Args:
            proposal: the plan.
            terms: what its operator was shown; single lines.
        """
        path = self._path(proposal.hash)
        if path.exists():
            return
        shown = "".join(f"# {name}: {value}\n" for name, value in terms)
        budget = budget_in_force(proposal.config, None)
        delta = proposal.config.privacy.target_delta
        granted = f"[accepted]\nbudget_epsilon = {budget!r}\ntarget_delta = {delta!r}\n"
        text = f"{shown}{_WITHDRAWAL}{granted}\n{proposal.config.to_toml()}"
        write_atomically(path, text.encode())

    def largest_budget(self) -> tuple[float, float] | None:
        """Returns epsilon over all runs and delta, the largest of each accepted yet.

        Raises:
            RunError: if a file is none that :meth:`accept` wrote.
        """
        budgets = []
        for path in sorted(self._folder.glob("*.toml")):
            try:
                granted = tomllib.loads(path.read_text(encoding="utf-8"))["accepted"]
                budget, delta = granted["budget_epsilon"], granted["target_delta"]
                budgets.append((float(budget), float(delta)))
            except (ValueError, KeyError, TypeError):
                raise RunError(
                    f"Expected an accepted plan in {path}, got something else: restore "
                    "it, or move it away and accept the plan anew."
                ) from None
        if not budgets:
            return None
        return max(b for b, _ in budgets), max(d for _, d in budgets)

    def _path(self, hash_: str) -> Path:
        return self._folder / f"{hash_}.toml"
