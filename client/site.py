"""What a client process keeps warm between rounds: model, engine, data.

The backbone is held once a process, however many simulated clients the process serves:
between rounds a client is only its data, its ledger and its outbox.
"""

import functools
import hashlib
from dataclasses import dataclass

from fedpeft.compression import COMPRESSORS, ErrorFeedback
from fedpeft.config import RunConfig, build
from fedpeft.data import Encoded, encode, load, partition, split
from fedpeft.interfaces import Compressor, PrivacyEngine
from fedpeft.model import TaskModel, build_model
from fedpeft.privacy import DpSgd, NonPrivate, Plan, make_plan


@dataclass(frozen=True)
class Site:
    """Everything that depends on the configuration alone.

    Attributes:
        config: the client's own copy, by which requests are judged.
        plan: None without privacy.
        engine: bound to the model.
        clients: the examples of each client, encoded.
    """

    config: RunConfig
    plan: Plan | None
    model: TaskModel
    engine: PrivacyEngine
    compressor: Compressor
    clients: list[Encoded]

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """The wrapper, where the configuration asks for it."""
        wanted = self.config.compression.error_feedback
        return ErrorFeedback(self.compressor) if wanted else None

    def data_source(self, client: int) -> str:
        """Names a client's data over all runs: they continue the same ledger."""
        return f"client-{client:03d}-{partition_digest(self.config)}"


def partition_digest(config: RunConfig) -> str:
    """Returns a short hash of what decides which records a client holds.

    Nothing else enters, so that runs that differ in method, seed or length share a
    ledger.
    """
    deciding = {"name", "path", "group", "test_fraction", "validation_fraction"}
    data = config.data.model_dump_json(include={*deciding, "split_seed"})
    content = data + config.partition.model_dump_json()
    return hashlib.sha256(content.encode()).hexdigest()[:8]


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
    engine: PrivacyEngine = NonPrivate()
    if plan is not None:
        engine = DpSgd(plan.clipping_norm, plan.noise_multiplier, plan.nominal_batch)
    engine.bind(model.module, model.operations)
    return Site(
        config,
        plan,
        model,
        engine,
        build(COMPRESSORS, config.compression, "compression"),
        [encoded.subset(indices) for indices in parts],
    )
