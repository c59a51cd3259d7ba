"""Confidence intervals: of a proportion, and of a mean over victims.

>>> low, high = clopper_pearson(0, 50, alpha=0.05)
>>> low, round(high, 3)
(0.0, 0.071)
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import special, stats

_RESAMPLES = 2000


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


def wilson(successes: int, trials: int, alpha: float = 0.05) -> tuple[float, float]:
    """Returns a proportion's interval by the score test: shorter, and approximate.

    For figures; what decides anything takes :func:`clopper_pearson`.

    >>> low, high = wilson(5, 10)
    >>> round(low, 3), round(high, 3)
    (0.237, 0.763)

    Source:
        Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953.
    """
    check_counts(successes, trials)
    check_alpha(alpha)
    share, square = successes / trials, float(special.ndtri(alpha / 2)) ** 2
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    spread = share * (1 - share) / trials + square / (4 * trials**2)
    half = math.sqrt(square * spread) / (1 + square / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Sequence[float] | npt.NDArray[np.float64],
    *,
    seed: int,
    alpha: float = 0.05,
    least: float = -math.inf,
    largest: float = math.inf,
) -> tuple[float, float]:
    """Returns the interval of a mean, by the BCa bootstrap.

    Values of one victim depend on each other, so there must be one value a victim: see
    :func:`mean_by_victim`. A paired difference is a mean of differences.

    **Guarantees**: approximate; its coverage tends to ``1 - alpha`` as victims grow in
    number. Equal values, or a single one, have no spread to draw from; then it is the
    exact statement that is left: at most the share
    ``1 - (alpha / 2)**(1 / len(values))`` of victims can be otherwise, and they may lie
    anywhere between `least` and `largest`. Without such a range the interval is
    infinite. The same seed gives the same interval.

    Args:
        values: shape ``(victims,)``, independent of each other.
        seed: of the resampling.
        alpha: in (0, 1).
        least: the smallest value that there could be, such as 0 for a share.
        largest: the largest.

    Source:
        Efron (1987), "Better bootstrap confidence intervals",
        https://doi.org/10.1080/01621459.1987.10478410.

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
    if np.ptp(data) == 0:
        value, unseen = float(data[0]), 1 - (alpha / 2) ** (1 / len(data))
        return value - unseen * (value - least), value + unseen * (largest - value)
    interval = stats.bootstrap(
        (data,),
        np.mean,
        confidence_level=1 - alpha,
        n_resamples=_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def mean_by_victim(
    values: Sequence[float], victims: Sequence[int | str]
) -> npt.NDArray[np.float64]:
    """Returns one mean a victim, in the order in which victims first appear.

    >>> mean_by_victim([1.0, 0.0, 1.0], ["a", "a", "b"]).tolist()
    [0.5, 1.0]
    """
    if len(values) != len(victims):
        raise ValueError(
            f"Expected one victim for each value, got {len(values)} values and "
            f"{len(victims)} victims: repeat a victim's name for each of its values."
        )
    of_victim: dict[int | str, list[float]] = {}
    for value, victim in zip(values, victims, strict=True):
        of_victim.setdefault(victim, []).append(value)
    return np.array([np.mean(own) for own in of_victim.values()])


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
