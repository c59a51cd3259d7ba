"""What of a run is replayed: its configuration, on data that an auditor may see."""

import math
from collections.abc import Sequence
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError

_PUBLIC = {
    "text-classification": "rotten-tomatoes",
    "image-classification": "fashion-mnist",
    "causal-lm": "review-writing",
}
"""What stands in for data that the auditor must not see, by task."""

_OF_ANY_DATA = (
    "nominal_examples",
    "test_fraction",
    "validation_fraction",
    "split_seed",
    "max_length",
    "max_examples",
    "image_size",
)
"""Keys of ``[data]`` that speak of no column and no label of a file."""

_FEWEST = 400
"""Records of a stand-in, so that all classes are among those that are held out."""

_OF_THE_RUN = ("record", "auditor")
"""Keys of ``[audit]`` that clients have agreed to: what was kept, and for whom."""


def public(config: RunConfig) -> RunConfig:
    """Returns the configuration on public data: its own if they are, else a stand-in.

    Plan, method, training and compression stay as they are. A client holds about as
    many records as its nominal number says, or more where that makes very few in all.
    Each record of a stand-in is another person's: where persons are protected, examples
    are in the replay.

    Raises:
        ConfigError: if the run is not possible on the stand-in.
    """
    if config.data.name is not None:
        return config
    table = config.model_dump(mode="json", exclude_none=True)
    # A partition by group would need the groups of the private data.
    table["partition"] = {"name": "iid", "num_clients": config.partition.num_clients}
    table["data"] = _stand_in(config, table["data"])
    if config.privacy.unit == "person":
        table["privacy"]["unit"] = "example"
    try:
        return RunConfig.from_table(table)
    except ConfigError as error:
        raise ConfigError(f"No replay on public data: {error}") from None


def _stand_in(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    kept = {key: data[key] for key in _OF_ANY_DATA if key in data}
    named = {**kept, "name": _PUBLIC[config.model.task]}
    nominal = config.nominal_units
    if not nominal:
        return named
    train = 1 - config.data.test_fraction - config.data.validation_fraction
    most = max(_FEWEST, math.ceil(nominal * config.partition.num_clients / train))
    return {**named, "nominal_examples": nominal, "max_examples": most}


def with_settings(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Returns a run's configuration with an auditor's own ``audit.key=value``.

    Whoever is audited does not choose which attacks are tried. What the run recorded,
    and for whom, stays as it was.

    Raises:
        ConfigError: for a key that is none of an audit's, or a value that it refuses.
    """
    for override in overrides:
        section, *keys = override.partition("=")[0].strip().split(".")
        if section != "audit" or not keys or keys[0] in _OF_THE_RUN:
            raise ConfigError(
                "--set: expected audit.KEY=VALUE with a key other than "
                f"{' and '.join(_OF_THE_RUN)}, got {override!r}: all else is as the "
                "run had it."
            )
    return RunConfig.from_toml(config.to_toml(), overrides) if overrides else config


def replay_limits(config: RunConfig, replayed: RunConfig) -> list[str]:
    """Says in sentences what a replay leaves out of a run."""
    limits = []
    if config.audit.rounds < config.run.rounds:
        limits.append(
            f"The replay stopped after {config.audit.rounds} of {config.run.rounds} "
            "rounds; an adversary who sees more of them learns more."
        )
    if replayed is not config:
        limits.append(
            f"The replay's data are {replayed.data.name}, which stand in for the run's "
            "own; other data may leak more or less."
        )
    if replayed.privacy.unit != config.privacy.unit:
        limits.append(
            "The replay protects examples in place of persons: each person of the "
            "stand-in has one record, so what several of one person give away together "
            "was not attacked."
        )
    return limits
