r"""The privacy loss of one noised step, on a grid that errs upward.

A step's *profile* is its delta as a function of epsilon; with it dp-accounting makes a
distribution of losses on a grid, whose delta is nowhere below the step's (connect the
dots), and which composes. Here are the profiles, in closed form, of a sum to which one
unit adds at most 1 in L2 and which gets Gaussian noise; G is that of the noised sum
when everybody takes part (Balle & Wang 2018, theorem 8).

**Poisson**, add-or-remove-one: each unit is drawn on its own with probability q. Of one
who may have been removed, and of one who may have been added (epsilon >= 0):

    removed(epsilon) = q G(log(1 + (e^epsilon - 1) / q))
    added(epsilon) = (1 - (1 - q) e^epsilon) G(-log(1 + (e^-epsilon - 1) / q))

or 0 where the bracket is negative.

**Fixed**, replace-one: exactly the share q of all units is drawn, without replacement.
One that is replaced moves the sum by up to 2, so G is that of half the noise; the step
has at most the profile `removed`, in both directions, and some data have it. (If the
unit is not drawn, which has probability 1 - q, nothing changes; if it is, both the sums
with the other one and those with any third in its place are one replacement away.)

Losses below 0 follow from the other direction's above 0.

Source:
    Sampling: Balle, Barthe & Gaboardi (2018), theorems 8 and 9,
    https://arxiv.org/abs/1807.01647. That such a bound composes as if it were the
    profile of one pair of distributions, also if later steps depend on earlier results:
    Zhu, Dong & Wang (2022), https://arxiv.org/abs/2106.08567. Grid: Doroshenko et al.
    (2022), algorithm 1, https://arxiv.org/abs/2207.04380.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy import special

Array: TypeAlias = npt.NDArray[np.float64]


def removed(values: Array, noise_multiplier: float, sampling_rate: float) -> Array:
    """Returns the profile of a unit that may have been removed.

    Args:
        values: epsilons of 0 and more.
        noise_multiplier: standard deviation of the noise over the most that
            neighbouring data change the sum by.
        sampling_rate: in (0, 1].

    >>> removed(np.array([1.0]), noise_multiplier=1.0, sampling_rate=1.0).round(5)
    array([0.12694])
    """
    odds = 1 / sampling_rate - 1
    unsampled = values + np.log1p(-odds * np.expm1(-values))
    return sampling_rate * _gaussian(unsampled, noise_multiplier)


def added(values: Array, noise_multiplier: float, sampling_rate: float) -> Array:
    """Returns the profile of a unit that may have been added; see :func:`removed`."""
    profile = np.zeros_like(values)
    inner = np.expm1(-values) / sampling_rate
    reached = inner > -1
    inner = inner[reached]
    weight = sampling_rate * np.exp(values[reached]) * (1 + inner)
    profile[reached] = weight * _gaussian(-np.log1p(inner), noise_multiplier)
    return profile


def largest_loss(noise_multiplier: float, sampling_rate: float, tail: float) -> float:
    """Returns the loss that one step exceeds with a probability below `tail`."""
    highest = 1 + noise_multiplier * _deviations(tail)
    return _loss_at(highest, noise_multiplier, sampling_rate)


def step_loss(
    noise_multiplier: float,
    sampling_rate: float,
    sampling: Literal["poisson", "fixed"],
    *,
    interval: float,
    tail: float,
) -> Any:
    """Returns a step's distribution of losses, both directions, ready to compose.

    **Guarantees**: its delta is at no epsilon below the step's.

    Args:
        noise_multiplier: standard deviation of the noise over the most that
            neighbouring data change the sum by.
        sampling_rate: in (0, 1].
        sampling: ``poisson`` or ``fixed``.
        interval: the grid's cell, in units of epsilon.
        tail: a loss exceeded with less than this probability counts as infinite.
    """
    far = noise_multiplier * _deviations(tail)
    lowest, likely, highest = (
        _loss_at(outcome, noise_multiplier, sampling_rate)
        for outcome in (-far, far, 1 + far)
    )

    def on_grid(low: float, high: float, ahead: _Profile, behind: _Profile) -> Any:
        first, last = math.floor(low / interval), math.ceil(high / interval)
        values: Array = interval * np.arange(first, last + 1, dtype=np.float64)
        deltas, up = np.empty_like(values), values >= 0
        deltas[up] = ahead(values[up], noise_multiplier, sampling_rate)
        mirrored = behind(-values[~up], noise_multiplier, sampling_rate)
        deltas[~up] = np.exp(values[~up]) * mirrored - np.expm1(values[~up])
        # Where rounding lets them rise, they err upward.
        deltas = np.maximum.accumulate(np.clip(deltas, 0.0, 1.0)[::-1])[::-1]
        masses = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
            interval, first, last, deltas
        )
        # Its sparse form counts cells as an integer to the power of the steps.
        return masses.to_dense_pmf()

    if sampling == "fixed" or sampling_rate == 1:  # both directions are equal
        return PrivacyLossDistribution(on_grid(-likely, highest, removed, removed))
    return PrivacyLossDistribution(
        on_grid(lowest, highest, removed, added),
        on_grid(-likely, -lowest, added, removed),
    )


_Profile: TypeAlias = Callable[[Array, float, float], Array]


def _gaussian(values: Array, noise_multiplier: float) -> Array:
    """The profile of a noised sum without sampling (Balle & Wang 2018, theorem 8)."""
    half, deviations = 0.5 / noise_multiplier, values * noise_multiplier
    profile: Array = special.ndtr(half - deviations) - np.exp(
        values + special.log_ndtr(-half - deviations)
    )
    return profile


def _deviations(tail: float) -> float:
    return -float(special.ndtri(tail / 2))


def _loss_at(outcome: float, noise_multiplier: float, sampling_rate: float) -> float:
    """The loss if a unit is removed and the sum, along its contribution, is this."""
    unsampled = (outcome - 0.5) / noise_multiplier**2
    if unsampled > 500 or sampling_rate == 1:
        return unsampled + math.log(sampling_rate)
    return math.log1p(sampling_rate * math.expm1(unsampled))
