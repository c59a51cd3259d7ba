"""Calibration: the least noise, or the most steps, that a target epsilon allows.

>>> calibrate(0.0625, 320, target_epsilon=8.0, target_delta=1e-5)
0.97581
"""

import math
from collections.abc import Callable

from scipy import optimize

from fedpeft.errors import ConfigError
from fedpeft.privacy.accountant import (
    MAX_STEPS,
    ROUNDING_A_STEP,
    Composition,
    epsilon,
)

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
    sampling_rate: float, steps: int, *, target_epsilon: float, target_delta: float
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

    Raises:
        TargetOutOfReach: if :data:`MAX_NOISE_MULTIPLIER` is not enough; names the
            largest number of steps that would fit.
        ValueError: for arguments out of range.
    """
    _check_target(target_epsilon)

    def cost(noise_multiplier: float) -> float:
        done = Composition(noise_multiplier, sampling_rate, steps)
        return epsilon([done], target_delta)

    if cost(MAX_NOISE_MULTIPLIER) > target_epsilon:
        fit = max_steps(
            MAX_NOISE_MULTIPLIER,
            sampling_rate,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
        )
        raise TargetOutOfReach(
            f"Expected a target that noise_multiplier <= {MAX_NOISE_MULTIPLIER:g} "
            f"reaches in {steps} steps at sampling rate {sampling_rate:g}, got epsilon "
            f"{target_epsilon:g} at delta {target_delta:g}: {fit} steps fit; take "
            f"fewer steps or a larger epsilon.",
            fit,
        )
    if cost(MIN_NOISE_MULTIPLIER) <= target_epsilon:
        return MIN_NOISE_MULTIPLIER
    return _least_noise(cost, target_epsilon)


def max_steps(
    noise_multiplier: float,
    sampling_rate: float,
    *,
    target_epsilon: float,
    target_delta: float,
) -> int:
    """Returns the largest number of steps that stay within a target; 0 if none does.

    Never more than :func:`epsilon` can account, even where more would fit.

    Raises:
        ValueError: for arguments out of range.

    >>> max_steps(0.97581, 0.0625, target_epsilon=8.0, target_delta=1e-5)
    320
    """
    _check_target(target_epsilon)

    def fits(steps: int) -> bool:
        done = Composition(noise_multiplier, sampling_rate, steps)
        return epsilon([done], target_delta) <= target_epsilon

    limit = max(1, min(MAX_STEPS, int(target_delta / (2 * ROUNDING_A_STEP))))
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _least_noise(cost: Callable[[float], float], target: float) -> float:
    """Returns the least five-digit noise multiplier whose cost is within the target.

    Rounding also makes the result equal on machines whose FFTs differ in the last bit.
    """
    # Nearly a straight line in logarithms, which Brent's method finds in a few steps;
    # the ends are out by a little, so that rounding cannot bring both to one side.
    root = optimize.brentq(
        lambda log_noise: math.log(max(cost(math.exp(log_noise)), 1e-9) / target),
        math.log(MIN_NOISE_MULTIPLIER) - 1e-3,
        math.log(MAX_NOISE_MULTIPLIER) + 1e-3,
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
