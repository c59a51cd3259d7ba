"""From scores to figures: means over victims, each with its interval."""

import math
from collections.abc import Sequence

import torch

from fedpeft.attacks.attack import Scores
from fedpeft.audit.intervals import bootstrap_mean, clopper_pearson, may_hide_others
from fedpeft.audit.results import Estimate
from fedpeft.seeds import derive_seed

_LEVEL = 0.05

_RANGES = {"share": (0.0, 1.0), "": (-1.0, 1.0)}
"""What a value can be, by unit: decibels and bits have no largest one."""


def estimates(
    scores: Sequence[Scores], units: dict[str, str], seed: int
) -> dict[str, Estimate]:
    """Returns each metric's mean over victims; those that were resolved."""
    if not scores:
        return {}
    return {
        metric: estimate(
            [one[metric].double() for one in scores], unit, derive_seed(seed, metric)
        )
        for metric, unit in units.items()
        if metric in scores[0]  # an attack leaves out what it could not resolve
    }


def estimate(values: Sequence[torch.Tensor], unit: str, seed: int) -> Estimate:
    """Returns the mean over victims; records of one victim depend on each other."""
    together = torch.cat(list(values))
    is_binary = bool(((together == 0) | (together == 1)).all())
    if is_binary and all(len(value) == 1 for value in values):
        successes, trials = int(together.sum()), len(together)
        low, high = clopper_pearson(successes, trials, _LEVEL)
        return Estimate(successes / trials, low, high, "Clopper-Pearson")
    ends = _RANGES.get(unit, (-math.inf, math.inf))
    return _bootstrap([float(value.mean()) for value in values], ends, seed)


def differences(
    own: Sequence[Scores], controls: Sequence[Scores], units: dict[str, str], seed: int
) -> dict[str, Estimate]:
    """Returns attack minus control, paired by victim."""
    if not own:
        return {}
    return {
        metric: _bootstrap(
            [
                float(mine[metric].double().mean() - other[metric].double().mean())
                for mine, other in zip(own, controls, strict=True)
            ],
            _reach(unit),
            derive_seed(seed, metric, "difference"),
        )
        for metric, unit in units.items()
        if metric in own[0]
    }


def _reach(unit: str) -> tuple[float, float]:
    """Returns what a difference of two values can be."""
    least, largest = _RANGES.get(unit, (-math.inf, math.inf))
    return least - largest, largest - least


def _bootstrap(
    means: Sequence[float], ends: tuple[float, float], seed: int
) -> Estimate:
    least, largest = ends
    kept = [min(max(mean, least), largest) for mean in means]  # a cosine's rounding
    low, high = bootstrap_mean(
        kept, seed=seed, alpha=_LEVEL, least=least, largest=largest
    )
    method = "BCa bootstrap and Student t over victims"
    if math.isfinite(largest) and may_hide_others(kept):
        method += ", and a share of unseen others"
    return Estimate(sum(kept) / len(kept), low, high, method)
