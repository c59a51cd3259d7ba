r"""Epsilons between two normal distributions, in closed form.

Two neighbouring data sets give N(0, 1) and N(mu, s\ :sup:`2`). At equal spread this is
the Gaussian mechanism; at unequal spread the log ratio of the densities is a parabola,
so that it exceeds epsilon between or outside two points.

>>> round(gaussian_epsilon(1.0, delta=1e-5), 3)
4.377
"""

import math
from collections.abc import Callable

from scipy import optimize, special


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns the epsilon of a mechanism that is mu-GDP, and no better.

    Args:
        mu: distance of the two distributions, in standard deviations; 0 or more.
        delta: in (0, 1).

    Source:
        Balle & Wang (2018), theorem 8, https://arxiv.org/abs/1805.06530.
    """
    if mu == math.inf:
        return math.inf

    def excess(epsilon: float) -> float:
        above = float(special.log_ndtr(mu / 2 - epsilon / mu))
        below = epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))
        return above + _log1mexp(below - above) - math.log(delta)

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    return _root(excess)


def fitted_epsilon(mu: float, spread: float, delta: float) -> float:
    """Returns the epsilon between N(0, 1) and N(mu, spread^2), the worse direction.

    >>> round(fitted_epsilon(1.0, 1.0, delta=1e-5), 3)
    4.377
    """

    def excess(epsilon: float) -> float:
        forth = _log_delta(mu, spread, epsilon)
        back = _log_delta(-mu / spread, 1 / spread, epsilon)
        return max(forth, back) - math.log(delta)

    return 0.0 if excess(0.0) <= 0 else _root(excess)


def _log_delta(mu: float, spread: float, epsilon: float) -> float:
    """The log of the hockey-stick divergence of N(mu, spread^2) from N(0, 1)."""
    region = _likelier(mu, spread, epsilon)
    if not region:
        return -math.inf
    with_canary = _log_mass([((a - mu) / spread, (b - mu) / spread) for a, b in region])
    without = epsilon + _log_mass(region)
    return with_canary + _log1mexp(without - with_canary)


def _likelier(mu: float, spread: float, epsilon: float) -> list[tuple[float, float]]:
    """Where the first density is more than e^epsilon times the second: intervals.

    There ``square * x^2 + slope * x + constant`` is above 0.
    """
    square = (1 - spread**-2) / 2
    slope = mu / spread**2
    constant = -math.log(spread) - slope * mu / 2 - epsilon
    if square == 0 and slope == 0:
        return []
    if square == 0:
        edge = -constant / slope
        return [(edge, math.inf)] if slope > 0 else [(-math.inf, edge)]
    discriminant = slope**2 - 4 * square * constant
    if discriminant <= 0:
        return [(-math.inf, math.inf)] if square > 0 else []
    larger = -(slope + math.copysign(math.sqrt(discriminant), slope)) / 2
    low, high = sorted([larger / square, constant / larger])
    if square < 0:
        return [(low, high)]
    return [(-math.inf, low), (high, math.inf)]


def _log_mass(region: list[tuple[float, float]]) -> float:
    """The log of the standard normal mass of intervals."""
    return float(special.logsumexp([_log_between(*interval) for interval in region]))


def _log_between(low: float, high: float) -> float:
    if low > 0:  # the lower tail is the one that floating point resolves
        low, high = -high, -low
    upper = float(special.log_ndtr(high))
    return upper + _log1mexp(float(special.log_ndtr(low)) - upper)


def _log1mexp(value: float) -> float:
    """``log(1 - e^value)``, and minus infinity where that is not above 0."""
    return math.log(-math.expm1(value)) if value < 0 else -math.inf


def _root(excess: Callable[[float], float]) -> float:
    """Returns where a falling function crosses 0, from 0 upwards."""
    high = 1.0
    while excess(high) > 0:
        high *= 2
    root: float = optimize.brentq(
        lambda epsilon: max(excess(epsilon), -10.0), 0.0, high, xtol=1e-10, rtol=1e-12
    )
    return root
