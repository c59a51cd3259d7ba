"""From scores to figures: means over victims, each with its interval."""

from collections.abc import Sequence

import torch

from fedpeft.attacks.attack import Scores
from fedpeft.audit.intervals import bootstrap_mean, clopper_pearson, may_hide_others
from fedpeft.audit.results import Estimate
from fedpeft.seeds import derive_seed

_LEVEL = 0.05


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
    return _bootstrap([float(value.mean()) for value in values], unit, 0.0, seed)


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
            unit,
            -1.0,
            derive_seed(seed, metric, "difference"),
        )
        for metric, unit in units.items()
        if metric in own[0]
    }


def _bootstrap(means: Sequence[float], unit: str, least: float, seed: int) -> Estimate:
    is_share = unit == "share"
    bounds = {"least": least, "largest": 1.0} if is_share else {}
    low, high = bootstrap_mean(means, seed=seed, alpha=_LEVEL, **bounds)
    mean = sum(means) / len(means)
    unseen = ", and a share of unseen others" if is_share else ""
    method = "BCa bootstrap and Student t over victims"
    return Estimate(
        mean, low, high, method + (unseen if may_hide_others(means) else "")
    )
