r"""Trade-off functions: what a composition leaves to an adversary who guesses.

Someone who sees the releases decides whether one unit's data was in them. The trade-off
function f says how rarely that can go wrong: whoever claims "in" of an absent unit with
probability a (the type I error) claims "out" of a present one with probability f(a) at
least (the type II error). f(a) = 1 - a is blind guessing, f = 0 no privacy at all.

A curve delta(epsilon) and a trade-off function say the same:

    f(a) = max over epsilon >= 0 of
           max(0, 1 - delta(epsilon) - e^epsilon a, e^-epsilon (1 - delta(epsilon) - a))

>>> spent = Composition(noise_multiplier=1.0, sampling_rate=0.0625, steps=320)
>>> round(trade_off(spent)(0.01), 2), round(reconstruction_bound(spent, 0.01), 2)
(0.82, 0.18)

Source:
    Dong, Roth & Su (2022), "Gaussian differential privacy", proposition 6 (the formula)
    and section 2.2, https://arxiv.org/abs/1905.02383.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from scipy import special

from fedpeft.privacy.accountant import (
    MAX_STEPS,
    ROUNDING_A_STEP,
    Composition,
    merged,
)
from fedpeft.privacy.loss import Array, largest_loss, step_loss

TradeOff: TypeAlias = Callable[[float], float]
"""``f(type_one)`` -> the smallest type II error; both in [0, 1]."""

# Less noise counts as none, as it does for the accountant.
_NO_NOISE = 0.01
# Losses that all steps together meet more rarely count as infinite: far below every
# error rate that canaries can show.
_TAIL = 1e-16
# What running sums over a distribution of up to a million cells may lose, with room.
_ROUNDING = 1e-9
# The grid's cell: a share of a step's typical loss, or of the largest, as in the
# accountant's first grid, but finer.
_SHARE = 0.1 / 3
_CELLS = 3000
# From 0 to 30, denser towards 0: e^-30 is below every error rate that matters.
_EPSILONS: Array = 30 * np.linspace(0.0, 1.0, 1501) ** 3


def gaussian_trade_off(mu: float) -> TradeOff:
    """Returns the trade-off function of a sum that one unit moves by `mu` deviations.

    Args:
        mu: the most that one unit changes the sum over the noise's standard deviation;
            of T releases of everybody's sum it is ``sqrt(T) / noise_multiplier``.

    >>> round(gaussian_trade_off(1.0)(0.5), 4)
    0.1587

    Source:
        Dong, Roth & Su (2022), equation 6.
    """
    if not 0 <= mu < math.inf:
        raise ValueError(f"Expected a finite mu >= 0, got {mu}.")

    def least_type_two(type_one: float) -> float:
        _check(type_one)
        return float(special.ndtr(-special.ndtri(type_one) - mu))

    return least_type_two


@lru_cache(maxsize=512)
def trade_off(composition: Composition) -> TradeOff:
    """Returns the smallest type II error that a composition allows.

    **Guarantees**: it errs downward, to the adversary's favour: nowhere above the true
    trade-off function of any neighbouring pair, in either direction. Errors below it
    falsify the composition; the grid is never to blame. Measured against the closed
    form, it is less than 0.0005 too low. The function is convex, falls, and is its own
    inverse. It is 0 where :func:`~fedpeft.privacy.accountant.epsilon` is infinite, and
    ``1 - a`` for no steps.

    Raises:
        ValueError: for more steps than the accountant takes.
    """
    if composition.steps > MAX_STEPS:
        raise ValueError(
            f"Expected at most {MAX_STEPS} steps in all, got {composition.steps}."
        )
    history = merged([composition])
    if not history:
        return gaussian_trade_off(0.0)
    if composition.noise_to_change < _NO_NOISE:
        return _no_privacy
    deltas = _composed(history[0]).get_delta_for_epsilon(_EPSILONS)
    rounding = composition.steps * ROUNDING_A_STEP + _ROUNDING
    return _dual(_EPSILONS, np.clip(deltas + rounding, 0.0, 1.0))


def reconstruction_bound(composition: Composition, prior: float) -> float:
    """Returns the largest probability that any adversary reconstructs one unit.

    **Guarantees**: whatever counts as success (to name the record among N candidates,
    to come within a distance of it), and whatever else is known: who would succeed with
    probability `prior` at most without the releases succeeds with this probability at
    most with them. Never below the true bound.

    Args:
        composition: what was released.
        prior: in [0, 1]; ``1 / N`` for a record among N equally likely candidates.

    Source:
        Hayes, Mahloujifar & Balle (2023), theorem 2, https://arxiv.org/abs/2302.07225;
        as a trade-off function: Kaissis et al. (2023),
        https://arxiv.org/abs/2307.03928.
    """
    return 1.0 - trade_off(composition)(prior)


def _composed(done: Composition) -> Any:
    """Returns the pessimistic distribution of the losses of all steps together."""
    tail, noise, rate = _TAIL / done.steps, done.noise_to_change, done.sampling_rate
    widest = largest_loss(noise, rate, tail)
    loss = step_loss(
        noise,
        rate,
        done.sampling,
        interval=max(_SHARE * rate / noise, widest / _CELLS),
        tail=tail,
    )
    return loss if done.steps == 1 else loss.self_compose(done.steps)


def _dual(epsilons: Array, deltas: Array) -> TradeOff:
    """Turns points of a curve delta(epsilon) into a function, by the formula above."""
    growth, shrinkage = np.exp(epsilons), np.exp(-epsilons)

    def least_type_two(type_one: float) -> float:
        _check(type_one)
        steep = 1 - deltas - growth * type_one
        flat = shrinkage * (1 - deltas - type_one)
        return max(0.0, float(steep.max()), float(flat.max()))

    return least_type_two


def _no_privacy(type_one: float) -> float:
    _check(type_one)
    return 0.0


def _check(type_one: float) -> None:
    if not 0 <= type_one <= 1:
        raise ValueError(f"Expected a probability between 0 and 1, got {type_one}.")
