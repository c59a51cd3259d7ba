"""Estimates by fitted normal distributions: close to the truth, and no bounds.

They extrapolate from the middle of the scores to tails that nobody has seen. Over
repeated experiments they exceed the true epsilon more often than a bound may, so that
they are shown beside the bounds and never decide.
"""

import math

import numpy as np
from scipy import special

from fedpeft.audit.bounds.gaussian import fitted_epsilon, gaussian_epsilon
from fedpeft.audit.bounds.lower_bound import LowerBound, Scores, check_delta
from fedpeft.audit.intervals import check_alpha, finite

_EQUAL = 1e-12
"""Scores that spread less, over their distance, are equal up to rounding."""


def gaussian_fit_estimate(
    in_scores: Scores, out_scores: Scores, *, delta: float, alpha: float = 0.05
) -> LowerBound:
    """Returns the epsilon of two normal distributions of equal spread.

    The distance of the means in standard deviations, less its standard error times the
    normal quantile of ``1 - alpha``.

    **Guarantees**: none; for normal scores of equal spread the share that exceeds the
    true epsilon tends to `alpha` as canaries grow in number.

    Args:
        in_scores: of canaries that are in, at least 2; larger means "in".
        out_scores: of canaries that are out, at least 2.
        delta: in (0, 1).
        alpha: in (0, 1).
    """
    check_delta(delta, zero_is_allowed=False)
    check_alpha(alpha)
    inside, outside = finite(in_scores, "in_scores"), finite(out_scores, "out_scores")
    _check_enough(inside.size, "in_scores")
    _check_enough(outside.size, "out_scores")
    n = inside.size + outside.size
    squares = inside.var() * inside.size + outside.var() * outside.size
    spread = math.sqrt(squares / (n - 2))
    gap = float(inside.mean() - outside.mean())
    if spread <= _EQUAL * abs(gap):
        mu = math.inf if gap > 0 else 0.0
    else:
        mu = gap / spread
        variance = 1 / inside.size + 1 / outside.size + mu**2 / (2 * n)
        mu += float(special.ndtri(alpha)) * math.sqrt(variance)
    return _estimate("gaussian-fit", mu, 1.0, delta, alpha, "normal scores", n)


def one_shot_cosine_estimate(
    cosines: Scores, dimension: int, *, delta: float, alpha: float = 0.05
) -> LowerBound:
    """Returns the epsilon between seen and unseen random directions.

    Canaries are random unit vectors that took part as contributions. The cosine of an
    unseen one with the released update is known to be N(0, 1 / dimension); to those of
    the seen ones a normal distribution is fitted, its mean taken at the lower limit of
    confidence ``1 - alpha``.

    **Guarantees**: none; asymptotic in the number of canaries and in the dimension.

    Args:
        cosines: of all canaries with the release, at least 2, in [-1, 1].
        dimension: number of coordinates of the release.
        delta: in (0, 1).
        alpha: in (0, 1).

    Source:
        Andrew et al. (2023), algorithm 1, https://arxiv.org/abs/2302.03098.
    """
    check_delta(delta, zero_is_allowed=False)
    check_alpha(alpha)
    seen = finite(cosines, "cosines")
    _check_enough(seen.size, "cosines")
    if dimension < 1 or np.abs(seen).max() > 1 + 1e-6:
        raise ValueError(
            f"Expected cosines in [-1, 1] and a dimension >= 1, got up to "
            f"{np.abs(seen).max():g} and {dimension}."
        )
    scaled = seen * math.sqrt(dimension)
    spread = float(scaled.std(ddof=1))
    error = spread / math.sqrt(seen.size)
    mu = float(scaled.mean()) + float(special.ndtri(alpha)) * error
    return _estimate(
        "one-shot-cosine", mu, spread, delta, alpha, "normal cosines", seen.size
    )


def _estimate(
    name: str,
    mu: float,
    spread: float,
    delta: float,
    alpha: float,
    assumption: str,
    n: int,
) -> LowerBound:
    """Makes an estimate of N(0, 1) without and N(mu, spread^2) with the canary."""
    if spread < _EQUAL:
        epsilon = math.inf
    elif spread == 1:
        epsilon = gaussian_epsilon(max(0.0, mu), delta)
    else:
        epsilon = fitted_epsilon(max(0.0, mu), spread, delta)
    return LowerBound(name, epsilon, alpha, math.inf, assumption, n, is_estimate=True)


def _check_enough(canaries: int, name: str) -> None:
    if canaries < 2:
        raise ValueError(f"Expected at least 2 {name} to fit a spread, got {canaries}.")
