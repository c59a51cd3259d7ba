"""Confidence intervals: of a proportion, and of a mean over victims.

>>> low, high = clopper_pearson(0, 50, alpha=0.05)
>>> low, round(high, 3)
(0.0, 0.071)
"""

import bisect
import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special, stats

_Interval = tuple[float, float]

_RESAMPLES = 2000
_FEW = 30
_MOST_VICTIMS = 1_000_000
_ROUNDING = 1e-12  # of the largest value: what differs by less is equal


def clopper_pearson(
    successes: int, trials: int, alpha: float = 0.05
) -> tuple[float, float]:
    """Returns a proportion's exact interval.

    **Guarantees**: covers the true probability at least ``1 - alpha`` of the time,
    whatever it is; each side misses it at most ``alpha / 2`` of the time.

    Args:
        successes: between 0 and `trials`.
        trials: independent ones, at least 1.
        alpha: in (0, 1).

    Source:
        Clopper & Pearson (1934), https://doi.org/10.1093/biomet/26.4.404.
    """
    return (
        1 - upper_limit(trials - successes, trials, alpha / 2),
        upper_limit(successes, trials, alpha / 2),
    )


def upper_limit(successes: int, trials: int, alpha: float) -> float:
    """Returns a proportion's exact upper limit, one-sided.

    **Guarantees**: below the true probability at most the share `alpha` of the time.

    >>> round(upper_limit(0, 1, alpha=0.05), 2)
    0.95
    """
    check_counts(successes, trials)
    check_alpha(alpha)
    if successes == trials:
        return 1.0
    return float(special.betainccinv(successes + 1, trials - successes, alpha))


def bootstrap_mean(
    values: Sequence[float] | npt.NDArray[np.float64],
    *,
    seed: int,
    alpha: float = 0.05,
    least: float = -math.inf,
    largest: float = math.inf,
) -> tuple[float, float]:
    """Returns the interval of a mean: BCa bootstrap, Student t and what is unseen.

    Values of one victim depend on each other, so there must be one value a victim. A
    paired difference is a mean of differences.

    It is the hull of the BCa interval, of Student's, and, where both ends of the range
    are known and :func:`may_hide_others`, of the unseen: at most the share
    ``1 - (alpha / 2)**(1 / len(values))`` of victims is taken to be other than all that
    were seen, and to lie anywhere between `least` and `largest`. Equal values, or a
    single one, have no spread; then this is all, and without a range the interval is
    infinite. The same seed gives the same interval.

    **Guarantees**: approximate. Measured with ``alpha = 0.05`` at 2, 3, 4, 5, 8, 20,
    30 and 50 victims, 1,000 times each, it covers at least 93 % for normal values
    without a range, and for these shares: 0 or 1; Beta(0.5, 5); 10 or 15 % of the
    victims at 0.7 to 0.8 and the others near 0. BCa alone covers 9 to 75 % of such
    shares at 2 or 3 victims. What befalls very few victims can still be missed:
    where 4 % leak and no two values are equal, 30 victims cover 70 %, 50 cover 86 %.

    Args:
        values: shape ``(victims,)``, independent of each other.
        seed: of the resampling.
        alpha: in (0, 1).
        least: the smallest value that there could be, such as 0 for a share.
        largest: the largest.

    Source:
        Efron (1987), "Better bootstrap confidence intervals",
        https://doi.org/10.1080/01621459.1987.10478410. Student (1908), "The probable
        error of a mean", https://doi.org/10.1093/biomet/6.1.1.

    >>> low, high = bootstrap_mean([1.0] * 20, seed=0, least=0.0, largest=1.0)
    >>> round(low, 2), high
    (0.83, 1.0)
    """
    check_alpha(alpha)
    data = finite(values, "values")
    if not least <= data.min() <= data.max() <= largest:
        raise ValueError(
            f"Expected values between {least:g} and {largest:g}, got "
            f"{data.min():g} to {data.max():g}: state the range of the metric."
        )
    low = high = mean = float(data.mean())
    has_spread = np.ptp(data) > _ROUNDING * np.abs(data).max()
    if has_spread:
        low, high = _hull(_bca(data, seed, alpha), _student(data, alpha))
    if not has_spread or (math.isfinite(largest - least) and may_hide_others(data)):
        unseen = 1 - (alpha / 2) ** (1 / len(data))
        others = mean - unseen * (mean - least), mean + unseen * (largest - mean)
        low, high = _hull((low, high), others)
    return max(low, least), min(high, largest)


def may_hide_others(values: Sequence[float] | npt.NDArray[np.float64]) -> bool:
    """Whether the spread of values says too little of victims that were not seen.

    Fewer than 30 victims miss one kind in ten too often, and where most are equal, the
    spread is that of the few others.

    >>> may_hide_others([0.0] * 48 + [0.1, 0.2]), may_hide_others(range(50))
    (True, False)
    """
    most = np.unique(values, return_counts=True)[1].max()
    return len(values) < _FEW or 2 * int(most) > len(values)


@functools.cache
def fewest_victims(limit: float) -> int | None:
    """Returns how many victims a share's limit takes where none leaks anything.

    The fewest whose interval of equal zeros, see :func:`bootstrap_mean`, lies within
    it; None if a million are too few.

    >>> fewest_victims(0.1), fewest_victims(1.0), fewest_victims(0.0)
    (36, 1, None)
    """

    def is_within(victims: int) -> bool:
        zeros = np.zeros(victims)
        return bootstrap_mean(zeros, seed=0, least=-1.0, largest=1.0)[1] <= limit

    found = 1 + bisect.bisect_left(range(1, _MOST_VICTIMS + 1), True, key=is_within)
    return found if found <= _MOST_VICTIMS else None


def _bca(data: npt.NDArray[np.float64], seed: int, alpha: float) -> _Interval:
    interval = stats.bootstrap(
        (data,),
        np.mean,
        confidence_level=1 - alpha,
        n_resamples=_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _student(data: npt.NDArray[np.float64], alpha: float) -> _Interval:
    half = stats.t.isf(alpha / 2, len(data) - 1) * stats.sem(data)
    return float(data.mean() - half), float(data.mean() + half)


def _hull(one: _Interval, other: _Interval) -> _Interval:
    return min(one[0], other[0]), max(one[1], other[1])


def finite(
    values: Sequence[float] | npt.NDArray[np.float64], name: str
) -> npt.NDArray[np.float64]:
    """Returns the values as an array.

    Raises:
        ValueError: if there are none, or if one is not a finite number.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(
            f"Expected {name} of shape (n,) with n >= 1, got {data.shape}: without "
            "values there is nothing to say."
        )
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ValueError(
            f"Expected finite {name}, got NaN or infinity in {bad} of {data.size}: "
            "find out why; leaving them out would bias the result."
        )
    return data


def check_counts(successes: int, trials: int) -> None:
    """Refuses counts that no experiment can give."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"Expected 0 <= successes <= trials and trials >= 1, got {successes} of "
            f"{trials}."
        )


def check_alpha(alpha: float) -> None:
    """Refuses what is no level of confidence."""
    if not 0 < alpha < 1:
        raise ValueError(f"Expected 0 < alpha < 1, got {alpha}.")
