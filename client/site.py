"""What a client process keeps warm between rounds: model, engine, data.

The backbone is held once a process, however many simulated clients the process serves:
between rounds a client is only its data, its ledger and its outbox.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from client.holding import Holding, read_own, read_records
from fedpeft.compression import COMPRESSORS, ErrorFeedback
from fedpeft.config import RunConfig, build
from fedpeft.data import Encoded
from fedpeft.errors import LedgerError
from fedpeft.features import feature_file, keep_features
from fedpeft.interfaces import Compressor, PrivacyEngine
from fedpeft.model import TaskModel, build_model, shared_state
from fedpeft.privacy import (
    SLACK,
    DpSgd,
    GradientSource,
    NonPrivate,
    Plan,
    data_sources,
    make_plan,
)
from fedpeft.tensors import Tensors


@dataclass(frozen=True, eq=False)
class Site:
    """Everything that depends on the configuration and the data alone.

    Attributes:
        config: the client's own copy, by which requests are judged.
        plan: None without privacy.
        start: what travels, as it is before the first round.
        engine: bound to the model.
        holdings: of every client of a simulation; of this client alone if `is_own`.
        is_own: whether the process serves one client, with records of its own, under
            whatever index the server gives it.
    """

    config: RunConfig
    plan: Plan | None
    model: TaskModel
    start: Tensors
    engine: PrivacyEngine
    compressor: Compressor
    holdings: tuple[Holding, ...]
    is_own: bool = False

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """The wrapper, where the configuration asks for it."""
        wanted = self.config.compression.error_feedback
        return ErrorFeedback(self.compressor) if wanted else None

    def holding(self, client: int) -> Holding:
        """Returns what a client holds.

        Raises:
            ValueError: if there is no such client.
        """
        if self.is_own:
            return self.holdings[0]
        if not 0 <= client < len(self.holdings):
            raise ValueError(f"Expected a client below {len(self.holdings)}.")
        return self.holdings[client]

    def check_state(self, state: Path) -> None:
        """Refuses a state directory that has counted other records.

        Raises:
            LedgerError: names them.
        """
        sources = {holding.source for holding in self.holdings}
        foreign = [name for name in data_sources(state) if name not in sources]
        if foreign:
            mine = self.holdings[0].source if self.is_own else "this partition"
            raise LedgerError(
                f"The state directory {state} belongs to {foreign[0]}, not to {mine}: "
                "renamed, the same records would get a fresh budget. Keep the name, or "
                "give other records another state directory."
            )


@functools.lru_cache(maxsize=1)
def open_site(toml: str, data: str = "") -> Site:
    """Builds the site of a resolved configuration, or returns the one at hand.

    A client's own file is read here, once: rows that change while the process runs
    count from its next start.

    Args:
        toml: the configuration's text; with `data` the key under which it is kept.
        data: JSON of an ``OwnDataSection``; empty in a simulation, where all clients
            are served and the scenario's data are dealt to them.
    """
    config = RunConfig.from_toml(toml)
    plan = make_plan(config)
    own = read_own(data)
    records = read_records(config, own)
    model = build_model(config, len(records.examples.label_names))
    encoded = model.task.encode(records.examples)
    parts = {
        source: encoded.subset(indices) for source, indices in records.parts.items()
    }
    return assemble(config, plan, model, parts, is_own=own is not None)


def assemble(
    config: RunConfig,
    plan: Plan | None,
    model: TaskModel,
    parts: Mapping[str, Encoded],
    *,
    is_own: bool,
) -> Site:
    """Binds an engine to the model and holds each data source's examples."""
    engine = make_engine(config, plan)
    engine.bind(model.module, model.operations)
    file = feature_file(config.training)
    precision = config.training.precision
    holdings = (
        Holding(source, part, keep_features(model, part, precision, file))
        for source, part in parts.items()
    )
    return Site(
        config,
        plan,
        model,
        shared_state(model),
        engine,
        build(COMPRESSORS, config.compression, "compression"),
        tuple(holdings),
        is_own,
    )


def make_engine(config: RunConfig, plan: Plan | None) -> PrivacyEngine:
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
