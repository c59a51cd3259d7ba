"""The accountant: which epsilon a history of noised releases amounts to.

What was done is data (:class:`Composition`); what it cost is a pure function of it
(:func:`epsilon`). All of it by composing privacy loss distributions (PLD) with
``dp_accounting``, whose grid errs upward.

>>> history = [Composition(noise_multiplier=1.0, sampling_rate=0.0625, steps=320)]
>>> round(epsilon(history, delta=1e-5), 2)
7.63
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from dp_accounting.pld import privacy_loss_distribution
from scipy import optimize, special

MAX_STEPS = 1_000_000
"""The longest history that is accounted; accuracy was measured up to here."""

# What double precision cannot tell apart errs upward: less noise than this counts as
# none, and a smaller sampling rate as this one.
_NO_NOISE = 0.01
_LEAST_RATE = 1e-8
# The first grid's cell is a share of a step's typical loss, or of the largest loss that
# matters, whichever is coarser.
_FIRST_CELLS = 1000
_FIRST_SHARE = 0.1
# Cells shrink by this factor until epsilon falls by less than the tolerance. The error
# of the pessimistic grid falls with the cell's square, so that the last fall was about
# eight times what is left.
_REFINEMENT = 3.0
_MAX_GRIDS = 4
_TOLERANCE = 1e-3
# Noise so far out that all steps together meet it with this share of delta counts as an
# infinite loss; a shorter range of losses makes the same number of cells finer.
_TAIL_SHARE = 1e-6
ROUNDING_A_STEP = 2.0**-50
"""What FFTs in double precision may lose of a composed tail's mass, a step. Measured
against the closed form: below 2e-17; this is 50 times as much."""


@dataclass(frozen=True)
class Composition:
    """Equal releases: the Poisson-subsampled Gaussian mechanism, `steps` times.

    Each example is in a step's batch with probability `sampling_rate`, on its own; what
    is released is the sum of the batch's contributions, each of L2 norm at most
    ``clipping_norm``, plus Gaussian noise of standard deviation
    ``noise_multiplier * clipping_norm`` on every coordinate. Neighbouring relation:
    add-or-remove-one.

    Attributes:
        noise_multiplier: unitless; 0 is a release without privacy.
        sampling_rate: in (0, 1].
        steps: number of releases; 0 is no release at all.

    Raises:
        ValueError: for a value outside these ranges, NaN among them.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        """Refuses what would make an epsilon wrong."""
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(
                f"Expected a finite noise_multiplier >= 0, got {self.noise_multiplier}."
            )
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(
                f"Expected 0 < sampling_rate <= 1, got {self.sampling_rate}."
            )
        if type(self.steps) is not int or self.steps < 0:
            raise ValueError(f"Expected an integer steps >= 0, got {self.steps!r}.")


def epsilon(history: Iterable[Composition], delta: float) -> float:
    """Returns the epsilon at `delta` of all releases of a history together.

    **Guarantees**: never below the true epsilon, for either direction of
    add-or-remove-one, also if each release was chosen after seeing those before it (at
    parameters fixed in advance). Above it by less than 0.1 %, typically 0.01 %, where
    epsilon is at least 0.01, the sampling rate at least 0.001 and delta at least 1,000
    times the least that is accepted; by a few percent elsewhere. Steps with equal
    parameters are one composition, however a history divides them: ten rounds give the
    same number, bit for bit, as all at once. ``inf`` if any release had no noise, or a
    multiplier below 0.01; 0.0 for no releases.

    Args:
        history: the releases; order does not matter.
        delta: in (0, 1).

    Raises:
        ValueError: for a delta outside (0, 1) or so small that double precision cannot
            resolve it (below 1.8e-15 a step), or for more than :data:`MAX_STEPS` steps.

    Source:
        Grid: Doroshenko et al. (2022), "Connect the Dots", https://arxiv.org/abs/2207.04380,
        Algorithm 1. Composition: Koskela et al. (2020), https://arxiv.org/abs/1906.03049.
    """
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta}.")
    steps: defaultdict[tuple[float, float], int] = defaultdict(int)
    for done in history:
        if done.steps:
            rate = max(float(done.sampling_rate), _LEAST_RATE)
            steps[float(done.noise_multiplier), rate] += done.steps
    merged = [Composition(*parameters, count) for parameters, count in steps.items()]
    merged.sort(key=lambda done: (done.noise_multiplier, done.sampling_rate))
    return _epsilon(tuple(merged), delta)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Composition, ...], delta: float) -> float:
    """Refines the grid until it no longer matters; every grid gives an upper bound."""
    if not history:
        return 0.0
    if any(done.noise_multiplier < _NO_NOISE for done in history):
        return math.inf
    steps = sum(done.steps for done in history)
    if steps > MAX_STEPS:
        raise ValueError(f"Expected at most {MAX_STEPS} steps in all, got {steps}.")
    rounding = steps * ROUNDING_A_STEP
    if delta < 2 * rounding:
        raise ValueError(
            f"Expected delta >= {2 * rounding:.1e} for {steps} steps, got {delta:g}: "
            "less cannot be accounted in double precision; use a larger delta."
        )
    tail = _TAIL_SHARE * delta / steps
    interval = _first_interval(history, tail)
    best = math.inf
    for _ in range(_MAX_GRIDS):
        previous = best
        loss = _loss(history, interval, tail)
        best = min(best, _smallest_epsilon(loss, delta - rounding))
        if previous - best <= _TOLERANCE * best < math.inf:
            break
        interval /= _REFINEMENT
    return best


def _first_interval(history: tuple[Composition, ...], tail: float) -> float:
    """Returns a grid cell that suits the scale and the range of the losses."""
    steps = sum(done.steps for done in history)
    square = sum(
        done.steps * (done.sampling_rate / done.noise_multiplier) ** 2
        for done in history
    )
    widest = max(_largest_loss(done, tail) for done in history)
    return max(_FIRST_SHARE * math.sqrt(square / steps), widest / _FIRST_CELLS)


def _largest_loss(done: Composition, tail: float) -> float:
    """Returns the loss that one step exceeds with a probability below `tail`."""
    deviations = -float(special.ndtri(tail / 2))
    unsampled = deviations / done.noise_multiplier + 0.5 / done.noise_multiplier**2
    if unsampled > 500:
        return unsampled + math.log(done.sampling_rate)
    return math.log1p(done.sampling_rate * math.expm1(unsampled))


def _loss(history: tuple[Composition, ...], interval: float, tail: float) -> Any:
    """Returns the pessimistic privacy loss distribution of a history, both ways."""
    parts = (
        privacy_loss_distribution.from_gaussian_mechanism(
            done.noise_multiplier,
            sampling_prob=done.sampling_rate,
            value_discretization_interval=interval,
            log_mass_truncation_bound=math.log(tail),
        ).self_compose(done.steps)
        for done in history
    )
    return reduce(lambda left, right: left.compose(right), parts)


def _smallest_epsilon(loss: Any, delta: float) -> float:
    """Inverts delta(epsilon), a falling function, and errs upward.

    The library's own inversion overflows where losses run into hundreds.
    """

    def excess(epsilon: float) -> float:
        reached = float(loss.get_delta_for_epsilon(epsilon))
        return math.log(max(reached / delta, 1e-3))

    if excess(0.0) <= 0:
        return 0.0
    if excess(math.inf) > 0:
        return math.inf
    low, high = 0.0, 1.0
    while excess(high) > 0:
        low, high = high, 2 * high
    root: float = optimize.brentq(excess, low, high, xtol=1e-12, rtol=1e-7)
    while excess(root) > 0:
        root *= 1 + 1e-7
    return root
