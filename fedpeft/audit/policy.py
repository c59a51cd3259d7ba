"""Policies: what an audit must show to pass, line by line, in a TOML file.

Each ``[[line]]`` names the column of evidence that it rests on, and one of

* ``metric = "ATTACK.METRIC"`` and ``leak_at_most``: the attack minus its prior-only
  control, or ``at_most``: the attack itself. ``*`` stands for any attack, or any metric
  that is a share.
* ``metric = "claim.FIELD"`` and ``at_most`` or ``equals``: a figure of the guarantee.
* ``check = "NAME"``: a check of the run, where ``*`` stands for any letters.
"""

import dataclasses
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from fedpeft.attacks import ATTACKS
from fedpeft.audit.results import Claim, Column
from fedpeft.audit.wording import (
    CLAIM,
    attack_words,
    metric_unit,
    metric_words,
    quantity,
)
from fedpeft.errors import ConfigError
from fedpeft.sections import Section
from fedpeft.wording import nearest, one_line

ANY = "*"
_LIMITS = ("at_most", "leak_at_most", "equals")
_FIELDS = [field.name for field in dataclasses.fields(Claim)]
_WORDS = [field.name for field in dataclasses.fields(Claim) if field.type is str]
_AMONG = "largest_success"
"""The field with several figures: one for each number of records."""


class Line(Section):
    """One demand.

    Attributes:
        column: of evidence that it rests on; that of the other is not looked at.
        metric: ``ATTACK.METRIC`` or ``claim.FIELD``.
        check: name of checks that must be in order.
        at_most: limit of the figure itself.
        leak_at_most: limit of attack minus prior-only control.
        equals: the word that must stand there.
    """

    column: Column
    metric: str | None = None
    check: str | None = None
    at_most: float | None = Field(default=None, strict=True)  # true is no number
    leak_at_most: float | None = Field(default=None, strict=True)
    equals: str | None = None

    @model_validator(mode="after")
    def _is_one_demand(self) -> "Line":
        given = [name for name in _LIMITS if getattr(self, name) is not None]
        if (self.metric is None) == (self.check is None):
            raise ValueError("expected either a metric or a check")
        if self.check == "":
            raise ValueError("expected check = 'NAME', or '*' for all, got ''")
        if self.check is not None and (given or self.column != "this-run"):
            raise ValueError("expected column = 'this-run' and no limit beside a check")
        if self.metric is not None and len(given) != 1:
            raise ValueError(f"expected one of {', '.join(_LIMITS)}, got {len(given)}")
        if self.metric is not None:
            self._check_metric(self.metric)
            self._check_limit(self.metric)
        return self

    def _check_metric(self, metric: str) -> None:
        subject, _, name = metric.partition(".")
        if subject == "claim":
            field = name.partition(".")[0]
            is_known = name in _FIELDS and name != _AMONG
            if not is_known and not re.fullmatch(rf"{_AMONG}[.][0-9]{{1,18}}", name):
                known = "expected claim.FIELD, or claim.largest_success.N"
                raise ValueError(f"{known}, got {metric}{nearest(field, _FIELDS)}")
            if self.column != "this-run" or self.leak_at_most is not None:
                raise ValueError(
                    "expected column = 'this-run', and at_most or equals beside a claim"
                )
            if name in _WORDS and self.equals is None:
                raise ValueError(f"expected equals beside {metric}, which is a word")
            return
        if not name or subject not in (ANY, *ATTACKS):
            known = "expected ATTACK.METRIC or claim.FIELD"
            raise ValueError(f"{known}, got {metric!r}{nearest(subject, ATTACKS)}")
        if self.equals is not None:
            raise ValueError("expected at_most or leak_at_most beside an attack")
        if subject == ANY and name == ANY and self.leak_at_most is None:
            raise ValueError("expected leak_at_most beside *.*, whose levels differ")

    def _check_limit(self, metric: str) -> None:
        """Refuses a limit that every share keeps to."""
        subject, _, name = metric.partition(".")
        is_share = name == ANY or metric_unit(name) == "share"
        if subject == "claim":
            is_share = name.startswith(f"{_AMONG}.")
        limit = self.at_most if self.leak_at_most is None else self.leak_at_most
        if is_share and limit is not None and limit > 1:
            raise ValueError(
                f"expected a limit of at most 1 for {metric}, a share, got {limit:g}"
            )

    @property
    def subject(self) -> str:
        """What the demand is about, as the file names it."""
        return self.metric or self.check or ""

    @property
    def rule(self) -> str:
        r"""The demand in words.

        >>> Line(column="this-run", check="*").rule
        'Every check of the run is in order'
        >>> Line(column="this-run", metric="claim.delta", at_most=1e-5).rule
        'Delta is at most 1e-05'
        >>> Line(column="replay", metric="*.auc", leak_at_most=0.05).rule
        'Every attack: members told from non-members (AUC) at most 5\xa0% above control'
        """
        if self.check is not None:
            what = "Every check of the run" if self.check == ANY else self.check
            return f"{what} is in order"
        subject, _, name = self.subject.partition(".")
        if subject == "claim":
            field, _, among = name.partition(".")
            words = CLAIM.get(field, field.replace("_", " ").capitalize())
            words += f" of {among}" if among else ""
            limit = self.equals if self.at_most is None else f"at most {self.at_most:g}"
            return f"{words} is {limit}"
        attack = "Every attack" if subject == ANY else attack_words(subject)
        metric = "every share" if name == ANY else metric_words(name)
        unit = "share" if name == ANY else metric_unit(name)
        if self.leak_at_most is not None:
            most = quantity(self.leak_at_most, unit)
            return f"{attack}: {metric} at most {most} above control"
        return f"{attack}: {metric} at most {quantity(self.at_most or 0.0, unit)}"


@dataclasses.dataclass(frozen=True)
class Policy:
    """Demands, in the order of their file; `name` is where they come from."""

    name: str
    lines: tuple[Line, ...]


def default_policy() -> Policy:
    """Returns the policy that holds where none is given."""
    text = files("fedpeft.audit").joinpath("default_policy.toml").read_text("utf-8")
    return parse_policy(text, "the default policy")


def read_policy(path: Path) -> Policy:
    """Reads a file; see :func:`parse_policy`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the policy {path}: {error}.") from None
    return parse_policy(text, str(path))


def parse_policy(text: str, name: str) -> Policy:
    """Reads a policy's text; `name` says in messages which it is.

    Raises:
        ConfigError: one line: what was expected, what came.
    """
    try:
        table = tomllib.loads(text)
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{name}: expected a TOML file: {error}.") from None
    for key in table:
        if key != "line":
            raise ConfigError(f"{name}: {key}: unknown key{nearest(key, ['line'])}")
    rows = table.get("line")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{name}: expected at least one [[line]], got none.")
    lines = [_parse_line(row, f"{name}, line {n}") for n, row in enumerate(rows, 1)]
    return Policy(name, tuple(lines))


def _parse_line(row: Any, where: str) -> Line:
    try:
        return Line.model_validate(row)
    except ValidationError as error:
        raise ConfigError(f"{where}: {one_line(error, Line)}") from None


def fits(pattern: str, name: str) -> bool:
    """Whether a name fits a pattern in which ``*`` stands for any letters.

    >>> fits("ledger of *", "ledger of client 3"), fits("ledger", "ledger of client 3")
    (True, False)
    """
    parts = (re.escape(part) for part in pattern.split(ANY))
    return re.fullmatch(".*".join(parts), name) is not None
