"""Calibration: the least noise, or the most steps, that a target epsilon allows.

>>> calibrate(0.0625, 320, target_epsilon=8.0, target_delta=1e-5)
0.97581
"""

import math
from collections.abc import Callable

from scipy import optimize

from fedpeft.errors import ConfigError
from fedpeft.privacy.accountant import Composition, Sampling, epsilon, most_steps

MAX_NOISE_MULTIPLIER = 1000.0
"""Calibration goes no further. Here the sum of a batch of 1,000 examples whose clipped
gradients all point one way is no longer than the noise on one single coordinate: with
the many coordinates of an adapter, what would be released is noise alone."""

MIN_NOISE_MULTIPLIER = 0.05
"""Calibration goes no lower: one full-batch step already costs an epsilon over 200."""


class TargetOutOfReach(ConfigError):
    """No noise multiplier up to :data:`MAX_NOISE_MULTIPLIER` reaches the target.

    Attributes:
        max_steps: the largest number of steps that fit at that noise; may be 0.
    """

    def __init__(self, message: str, max_steps: int) -> None:
        super().__init__(message)
        self.max_steps = max_steps


def calibrate(
    sampling_rate: float,
    steps: int,
    *,
    target_epsilon: float,
    target_delta: float,
    sampling: Sampling = "poisson",
) -> float:
    """Returns the smallest noise multiplier, to five digits, that reaches a target.

    **Guarantees**: the :func:`epsilon` of `steps` at this noise is at most the target,
    and above 98.75 % of it for targets from 0.001, unless
    :data:`MIN_NOISE_MULTIPLIER` already does better.

    Args:
        sampling_rate: in (0, 1].
        steps: of the whole plan, at least 1.
        target_epsilon: above 0.
        target_delta: in (0, 1).
        sampling: how units are drawn; it decides the neighbouring relation.

    Raises:
        TargetOutOfReach: if :data:`MAX_NOISE_MULTIPLIER` is not enough; names the
            largest number of steps that would fit.
        ValueError: for arguments out of range.
    """
    _check_target(target_epsilon)

    def cost(noise_multiplier: float) -> float:
        done = Composition(noise_multiplier, sampling_rate, steps, sampling)
        return epsilon([done], target_delta)

    low = high = 1.0
    while cost(high) > target_epsilon:
        if high == MAX_NOISE_MULTIPLIER:
            fit = max_steps(
                MAX_NOISE_MULTIPLIER,
                sampling_rate,
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                sampling=sampling,
            )
            raise TargetOutOfReach(
                f"Expected a target that noise_multiplier <= {MAX_NOISE_MULTIPLIER:g} "
                f"reaches in {steps} steps at sampling rate {sampling_rate:g}, got "
                f"epsilon {target_epsilon:g} at delta {target_delta:g}: {fit} steps "
                "fit; take fewer steps or a larger epsilon.",
                fit,
            )
        low, high = high, min(2 * high, MAX_NOISE_MULTIPLIER)
    while low == high or cost(low) <= target_epsilon:
        if low == MIN_NOISE_MULTIPLIER:
            return MIN_NOISE_MULTIPLIER
        low, high = max(low / 2, MIN_NOISE_MULTIPLIER), low
    return _least_noise(cost, target_epsilon, low, high)


def max_steps(
    noise_multiplier: float,
    sampling_rate: float,
    *,
    target_epsilon: float,
    target_delta: float,
    sampling: Sampling = "poisson",
) -> int:
    """Returns the largest number of steps that stay within a target; 0 if none does.

    Never more than :func:`epsilon` can account, even where more would fit.

    Raises:
        ValueError: for arguments out of range.

    >>> max_steps(0.97581, 0.0625, target_epsilon=8.0, target_delta=1e-5)
    320
    """
    _check_target(target_epsilon)

    def excess(steps: int) -> float:
        done = Composition(noise_multiplier, sampling_rate, steps, sampling)
        return math.log(max(epsilon([done], target_delta), 1e-9) / target_epsilon)

    limit = max(1, most_steps(target_delta))
    low, below = 0, -math.inf
    high, above = 1, excess(1)
    while above <= 0:
        if high == limit:
            return limit
        low, below = high, above
        high = min(8 * high, limit)
        above = excess(high)
    is_guess = True
    while high - low > 1:
        # A guess is nearly right, but from one side; every other time, halves bound
        # the search.
        line = _crossing(low, below, high, above)
        middle = line if is_guess else (low + high) // 2
        value = excess(middle)
        if value <= 0:
            low, below = middle, value
        else:
            high, above = middle, value
        is_guess = not is_guess
    return low


def _crossing(low: int, below: float, high: int, above: float) -> int:
    """Returns where the line through two points, in log steps, is 0; between them.

    Epsilon is nearly a power of the steps.
    """
    ratio = math.log(high / low)
    crossing = round(low * math.exp(ratio * below / (below - above)))
    return min(max(crossing, low + 1), high - 1)


def _least_noise(
    cost: Callable[[float], float], target: float, low: float, high: float
) -> float:
    """Returns the least five-digit noise multiplier whose cost is within the target.

    Rounding also makes the result equal on machines whose FFTs differ in the last bit.

    Args:
        cost: of a noise multiplier; falls with it.
        target: of the cost.
        low: costs more than the target.
        high: costs no more.
    """
    # Nearly a straight line in logarithms, which Brent's method finds in a few steps;
    # the ends are out by a little, so that rounding cannot bring both to one side.
    root = optimize.brentq(
        lambda log_noise: math.log(max(cost(math.exp(log_noise)), 1e-9) / target),
        math.log(low) - 1e-3,
        math.log(high) + 1e-3,
        xtol=1e-6,
    )
    noise = math.exp(root)
    decimals = 4 - math.floor(math.log10(noise))
    count = math.ceil(noise * 10.0**decimals)
    while cost(round(count / 10.0**decimals, decimals)) > target:
        count += 1
    while cost(round((count - 1) / 10.0**decimals, decimals)) <= target:
        count -= 1
    return round(count / 10.0**decimals, decimals)


def _check_target(target_epsilon: float) -> None:
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"Expected a finite target_epsilon > 0, got {target_epsilon}.")
