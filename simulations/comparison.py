"""On whose records candidates are compared, and on which they are judged."""

from dataclasses import dataclass
from pathlib import Path

import torch

from client.holding import read_records
from fedpeft import seeds
from fedpeft.backbone import load_backbone
from fedpeft.config import RunConfig
from fedpeft.data import Encoded, Examples, check_classes, load, split
from fedpeft.durable import make_directory
from fedpeft.errors import ConfigError, RunError
from fedpeft.privacy import data_sources
from fedpeft.tasks import TASKS

PUBLIC = "public"
"""The name of the public half's ledger, which nobody keeps."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What all trials share; see :func:`open_comparison`.

    Attributes:
        config: the scenario, fitted to the examples that are trained on.
        client: whose seeds are used, and whose records if `state` is given.
        source: names these records.
        examples: what is trained on.
        judged: public data that none of them is in.
        num_labels: of the task.
        num_layers: of the backbone; 0 if it does not tell.
        metric: of the task.
        is_loss: whether a smaller metric is a better one.
        state: where the client's ledger is; None on public data.
    """

    config: RunConfig
    client: int
    source: str
    examples: Encoded
    judged: Encoded
    num_labels: int
    num_layers: int
    metric: str
    is_loss: bool
    state: Path | None


def open_comparison(
    config: RunConfig, *, client: int = 0, state: Path | None = None
) -> Comparison:
    """Reads the data of a comparison and fits the scenario to them.

    On public data one half of the validation split is trained on and the other judges;
    the first is cut to the nominal number of units, or, if there are fewer, that number
    and the batch are lowered to it. With a state directory a client's own records are
    trained on, and the whole validation split judges. The test split stays unseen.

    Args:
        config: the scenario.
        client: its index.
        state: of the client's ledger; None for public data.

    Raises:
        ConfigError: if there is no validation split, or no such client; or the unit is
            ``client``, whose noise no client adds; or a client's records would be
            trained on without privacy.
        RunError: if the state directory counts other records.
    """
    check_scenario(config, client=client, is_charged=state is not None)
    splits = split(load(config.data), config.data)
    check_classes(splits.validation)
    backbone = load_backbone(config.model.backbone, config.model.task)
    task = TASKS[config.model.task].of(backbone, config.data)
    source, examples, judged = PUBLIC, splits.validation, splits.validation
    if state is None:
        examples, judged = _halves(splits.validation, config)
    else:
        source, examples = _own(config, client, state)
    encoded = task.encode(examples)
    if state is None and config.is_private:
        config, encoded = _fitted(config, encoded)
    return Comparison(
        config=config,
        client=client,
        source=source,
        examples=encoded,
        judged=task.encode(judged),
        num_labels=len(examples.label_names),
        num_layers=getattr(backbone.module.config, "num_hidden_layers", 0),
        metric=task.metric,
        is_loss=task.is_loss,
        state=state,
    )


def check_scenario(config: RunConfig, *, client: int, is_charged: bool) -> None:
    """Refuses, before anything is loaded, what cannot be compared; see above."""
    if not config.data.validation_fraction:
        raise ConfigError(
            "Expected [data] validation_fraction > 0, got 0: candidates are judged on "
            "that split and never on the test split; --set data.validation_fraction="
            "0.12, for example, and keep it in the runs that follow."
        )
    if not 0 <= client < config.partition.num_clients:
        raise ConfigError(
            f"--client: expected 0 to {config.partition.num_clients - 1}, got {client}."
        )
    unit = config.privacy.unit
    if unit == "client":
        raise ConfigError(
            "[privacy] unit: expected 'example', 'person' or 'none', got 'client': its "
            "noise is added to a cohort's sum, and a search has one client; compare "
            "with --set privacy.unit=none on public data."
        )
    if is_charged and not config.is_private:
        raise ConfigError(
            "[privacy] unit: expected 'example' or 'person' beside --data charged, got "
            "'none': what is trained without privacy costs an epsilon of infinity."
        )


def _halves(examples: Examples, config: RunConfig) -> tuple[Examples, Examples]:
    """Returns two disjoint halves that share no person, and no group if they can."""
    section = config.data.model_copy(
        update={"test_fraction": 0.5, "validation_fraction": 0.0}
    )
    halves = split(examples, section)
    return halves.train, halves.test


def _own(config: RunConfig, client: int, state: Path) -> tuple[str, Examples]:
    """Returns a client's records, under the name of its ledger in a simulation."""
    make_directory(state)
    records = read_records(config, None)
    foreign = [name for name in data_sources(state) if name not in records.parts]
    if foreign:
        raise RunError(
            f"The state directory {state} belongs to another data set or partition "
            f"(ledger {foreign[0]}): under this one the same records would be counted "
            "in two ledgers. Keep [data] and [partition] as they were."
        )
    source = list(records.parts)[client]
    return source, records.examples.subset(records.parts[source])


def _fitted(config: RunConfig, encoded: Encoded) -> tuple[RunConfig, Encoded]:
    """Makes public examples look like a client's: as many, or a smaller client."""
    by_person = config.privacy.unit == "person"
    units, nominal = encoded.units(by_person), config.nominal_units
    if len(units) >= nominal:
        rng = seeds.generator(config.data.split_seed, "search")
        order = torch.randperm(len(units), generator=rng)[:nominal].sort().values
        indices = [index for unit in order.tolist() for index in units[unit]]
        return config, encoded.subset(indices)
    batch = max(1, round(config.training.batch_size * len(units) / nominal))
    key = "nominal_persons" if by_person else "nominal_examples"
    data = config.data.model_copy(update={key: len(units)})
    training = config.training.model_copy(update={"batch_size": batch})
    return config.model_copy(update={"data": data, "training": training}), encoded
