"""Which differences from a plan weaken its guarantee, and which do not."""

import math
from collections.abc import Mapping
from typing import Literal

from fedpeft.audit.results import Check

_WEAKER: dict[str, Literal["less", "more", "other"]] = {
    "unit": "other",
    "relation": "other",
    "mechanism": "other",
    "sampling": "other",
    "noise_multiplier": "less",
    "sampling_rate": "more",
    "steps": "more",
    "local_steps": "more",
    "max_participations": "more",
    "bands": "more",
    "target_delta": "more",
    "planned_epsilon": "less",
}
"""What protects less than was claimed. Of the rest no epsilon depends: the noise is in
units of the clipping norm, divisors come after it, the noise on a count is part of it.
"""

_TOLERANCE = 1e-9
_EPSILON_TOLERANCE = 1e-6
"""An accountant's last bits are those of a machine's FFT, and of a root's search."""


def compare(
    what: str, found: Mapping[str, object], expected: Mapping[str, object], good: str
) -> Check:
    """Compares figures by name; only those that weaken the claim refute it.

    Args:
        what: is compared.
        found: by name; further ones are ignored.
        expected: by name.
        good: detail of a check that is in order.

    >>> compare("plan", {"noise_multiplier": 2.0}, {"noise_multiplier": 1.0}, "").detail
    'made by another version, or changed: noise_multiplier 2.0, expected 1.0'
    """
    wrong = [name for name in expected if not _same(name, found[name], expected[name])]
    weaker = [name for name in wrong if _weakens(name, found[name], expected[name])]
    if not wrong:
        return Check(what, "ok", good, falsifies=True)
    named = ", ".join(
        f"{name} {_shown(found[name])}, expected {_shown(expected[name])}"
        for name in weaker or wrong
    )
    reason = "protects less" if weaker else "made by another version, or changed"
    return Check(what, "failed", f"{reason}: {named}", falsifies=bool(weaker))


def _same(name: str, found: object, expected: object) -> bool:
    if not isinstance(found, float) or not isinstance(expected, float):
        return found == expected
    tolerance = _EPSILON_TOLERANCE if name == "planned_epsilon" else _TOLERANCE
    return math.isclose(found, expected, rel_tol=tolerance)


def _weakens(name: str, found: object, expected: object) -> bool:
    """Whether a difference protects less; what is no number does."""
    way = _WEAKER.get(name)
    if not isinstance(found, int | float) or not isinstance(expected, int | float):
        return way is not None
    if way == "less":
        return not found > expected
    return way == "other" or (way == "more" and not found < expected)


def _shown(value: object) -> str:
    return value[:16] if isinstance(value, str) else str(value)
