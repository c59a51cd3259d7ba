"""What is compared: ``[peft]`` tables, each at a learning rate."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from fedpeft.config import build
from fedpeft.errors import ConfigError
from fedpeft.peft import METHODS
from fedpeft.sections import PeftSection
from fedpeft.wording import one_line

RATE_FACTORS = (0.25, 1.0, 4.0)
"""On the scenario's learning rate, for a candidate that has none of its own."""

_LARGEST_RATE = 1e30
"""Beyond it not even one step can be taken in fp32."""


@dataclass(frozen=True)
class Candidate:
    """One choice.

    Attributes:
        peft: its ``[peft]`` table.
        learning_rate: of its training.
    """

    peft: PeftSection
    learning_rate: float

    @property
    def table(self) -> dict[str, Any]:
        """The table's keys, without those at which it says nothing."""
        return self.peft.model_dump(mode="json", exclude_none=True)

    @property
    def label(self) -> str:
        """The table in one line.

        >>> Candidate(PeftSection(name="lora", rank=8, freeze_a=True), 1.0).label
        'lora rank=8 freeze_a=true'
        """
        name, *options = self.table.items()
        return " ".join([name[1], *(f"{k}={json.dumps(v)}" for k, v in options)])

    @property
    def toml(self) -> str:
        """The table as it stands in a scenario, and the learning rate as a comment."""
        text: str = tomli_w.dumps({"peft": self.table})
        return f"{text}# [training] learning_rate = {self.learning_rate:g}\n"


def shipped_candidates(num_layers: int, learning_rate: float) -> list[Candidate]:
    """Returns methods, ranks and placements that are worth a look for most tasks.

    Args:
        num_layers: of the backbone; 0 if it is not known, then nothing is placed in the
            upper half alone.
        learning_rate: the scenario's.
    """
    upper = {"first_layer": num_layers // 2} if num_layers > 1 else {}
    tables: list[dict[str, Any]] = [
        {"name": "head"},
        {"name": "bias"},
        {"name": "film"},
        {"name": "ssf"},
        {"name": "lora", "rank": 2, "freeze_a": True},
        {"name": "lora", "rank": 8, "freeze_a": True},
        {"name": "lora", "rank": 8, "freeze_a": True, **upper},
        {"name": "lora", "rank": 8},
        {"name": "bottleneck", "width": 8, **upper},
    ]
    distinct = [t for i, t in enumerate(tables) if t not in tables[:i]]
    return [
        candidate
        for table in distinct
        for candidate in _at_rates(PeftSection(**table), learning_rate)
    ]


def read_candidates(path: Path, learning_rate: float) -> list[Candidate]:
    """Reads a TOML file of ``[[candidate]]`` tables.

    Each is a ``[peft]`` table; with a `learning_rate` it is one candidate, without it
    is one at each rate of the grid.

    Raises:
        ConfigError: for anything else; names the candidate.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"Cannot read the candidates {path}: {reason}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a TOML file: {error}.") from None
    tables = content.pop("candidate", None)
    if content or not isinstance(tables, list) or not tables:
        got = ", ".join(content) or "none"
        raise ConfigError(
            f"{path}: expected one or more [[candidate]] tables and nothing else, got "
            f"{got}."
        )
    candidates: list[Candidate] = []
    for number, table in enumerate(tables, 1):
        try:
            candidates += _parse(table, learning_rate)
        except ConfigError as error:
            raise ConfigError(f"{path}, candidate {number}: {error}") from None
    return candidates


def _parse(table: object, learning_rate: float) -> list[Candidate]:
    if not isinstance(table, dict):
        raise ConfigError(f"expected a table, got {table!r}.")
    rate = table.pop("learning_rate", None)
    try:
        peft = PeftSection.model_validate(table)
    except ValidationError as error:
        raise ConfigError(one_line(error, PeftSection, "candidate")) from None
    build(METHODS, peft, "candidate")
    if rate is None:
        return _at_rates(peft, learning_rate)
    if (
        isinstance(rate, bool)
        or not isinstance(rate, int | float)
        or not 0 < rate < _LARGEST_RATE
    ):
        raise ConfigError(
            f"learning_rate: expected a number above 0 and below {_LARGEST_RATE:g}, "
            f"got {rate!r}."
        )
    return [Candidate(peft, float(rate))]


def _at_rates(peft: PeftSection, learning_rate: float) -> list[Candidate]:
    return [Candidate(peft, factor * learning_rate) for factor in RATE_FACTORS]
