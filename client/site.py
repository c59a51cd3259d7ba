"""What a client process keeps warm between rounds: model, engine, data.

The backbone is held once a process, however many simulated clients the process serves:
between rounds a client is only its data, its ledger and its outbox.
"""

import functools
import hashlib
import json
from dataclasses import dataclass

from fedpeft.compression import COMPRESSORS, ErrorFeedback
from fedpeft.config import RunConfig, build
from fedpeft.data import Encoded, TextExamples, encode, load, partition, split
from fedpeft.interfaces import Compressor, PrivacyEngine
from fedpeft.model import TaskModel, build_model
from fedpeft.privacy import (
    SLACK,
    DpSgd,
    GradientSource,
    NonPrivate,
    Plan,
    make_plan,
)


@dataclass(frozen=True)
class Site:
    """Everything that depends on the configuration alone.

    Attributes:
        config: the client's own copy, by which requests are judged.
        plan: None without privacy.
        engine: bound to the model.
        clients: the examples of each client, encoded.
        digest: of the records each client holds, see :func:`partition_digest`.
    """

    config: RunConfig
    plan: Plan | None
    model: TaskModel
    engine: PrivacyEngine
    compressor: Compressor
    clients: list[Encoded]
    digest: str

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """The wrapper, where the configuration asks for it."""
        wanted = self.config.compression.error_feedback
        return ErrorFeedback(self.compressor) if wanted else None

    def units(self, client: int) -> list[list[int]]:
        """Returns the units of privacy among a client's examples."""
        return self.clients[client].units(self.config.privacy.unit == "person")

    def data_source(self, client: int) -> str:
        """Names a client's data over all runs: they continue the same ledger.

        Raises:
            ValueError: if there is no such client.
        """
        if not 0 <= client < len(self.clients):
            raise ValueError(f"Expected a client below {len(self.clients)}.")
        return f"client-{client:03d}-{self.digest}"


def partition_digest(examples: TextExamples, parts: list[list[int]]) -> str:
    """Returns a short hash of whose records each client holds, whatever led to it.

    Runs that differ in method, seed or length share ledgers. Runs in which any record
    lies elsewhere, was changed or is new do not: a ledger that went on under another
    deal of the same records would count some of them at two clients.
    """
    digest = hashlib.sha256()
    for indices in parts:
        held = sorted(
            (
                examples.texts[i],
                examples.label_names[int(examples.labels[i])],
                examples.persons[i] if examples.persons else "",
            )
            for i in indices
        )
        digest.update(json.dumps(held).encode())
    return digest.hexdigest()[:8]


@functools.lru_cache(maxsize=1)
def open_site(toml: str) -> Site:
    """Builds the site of a resolved configuration, or returns the one at hand.

    Args:
        toml: the configuration's text, the key under which the site is kept.
    """
    config = RunConfig.from_toml(toml)
    plan = make_plan(config)
    splits = split(load(config.data), config.data)
    model = build_model(config, len(splits.train.label_names))
    encoded = encode(splits.train, model.tokenizer, config.data.max_length)
    parts = partition(splits.train, config.partition)
    engine = _engine(config, plan)
    engine.bind(model.module, model.operations)
    return Site(
        config,
        plan,
        model,
        engine,
        build(COMPRESSORS, config.compression, "compression"),
        [encoded.subset(indices) for indices in parts],
        partition_digest(splits.train, parts),
    )


def _engine(config: RunConfig, plan: Plan | None) -> PrivacyEngine:
    """Returns DP-SGD where the client itself owes privacy."""
    if plan is None or not plan.is_dp_sgd:
        return NonPrivate()
    return DpSgd(
        plan.clipping_norm,
        plan.noise_multiplier,
        plan.nominal_batch,
        slack=SLACK[config.training.precision],
        source=_opacus() if config.privacy.engine == "opacus" else None,
    )


def _opacus() -> GradientSource:
    from fedpeft.privacy.opacus_hooks import OpacusHooks  # slow to import

    return OpacusHooks()
