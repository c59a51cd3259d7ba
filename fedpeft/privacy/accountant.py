"""The accountant: which epsilon a history of noised releases amounts to.

What was done is data (:class:`Composition`); what it cost is a pure function of it
(:func:`epsilon`). All of it by composing privacy loss distributions (PLD) with
``dp_accounting``, on a grid that errs upward.

>>> history = [Composition(noise_multiplier=1.0, sampling_rate=0.0625, steps=320)]
>>> round(epsilon(history, delta=1e-5), 2)
7.63
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from scipy import optimize

from fedpeft.privacy.loss import largest_loss, step_loss

Sampling: TypeAlias = Literal["poisson", "fixed"]
Relation: TypeAlias = Literal["add-or-remove-one", "replace-one"]

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
    """Equal releases: the subsampled Gaussian mechanism, `steps` times.

    What is released is the sum of the drawn units' contributions, each of L2 norm at
    most ``clipping_norm``, plus Gaussian noise of standard deviation
    ``noise_multiplier * clipping_norm`` on every coordinate. Each step draws afresh and
    in secret:

    * ``poisson``: each unit with probability `sampling_rate`, on its own. Neighbouring
      data sets differ by a unit that one of them lacks.
    * ``fixed``: exactly ``sampling_rate * population`` units, without replacement.
      Neighbouring data sets have one unit replaced; their sums may differ by twice the
      clipping norm.

    Attributes:
        noise_multiplier: unitless; 0 is a release without privacy.
        sampling_rate: in (0, 1].
        steps: number of releases; 0 is no release at all.
        sampling: how units are drawn.

    Raises:
        ValueError: for a value outside these ranges, NaN among them.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    sampling: Sampling = "poisson"

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
        if self.sampling not in ("poisson", "fixed"):
            raise ValueError(
                f"Expected sampling 'poisson' or 'fixed', got {self.sampling!r}."
            )

    @property
    def relation(self) -> Relation:
        """The neighbouring relation that its epsilon is about."""
        return "add-or-remove-one" if self.sampling == "poisson" else "replace-one"

    @property
    def noise_to_change(self) -> float:
        """The noise's standard deviation over the most that one unit changes a sum."""
        change = 1.0 if self.sampling == "poisson" else 2.0
        return self.noise_multiplier / change


def epsilon(history: Iterable[Composition], delta: float) -> float:
    """Returns the epsilon at `delta` of all releases of a history together.

    **Guarantees**: never below the true epsilon, for either direction of the history's
    relation, also if each release was chosen after seeing those before it (at
    parameters fixed in advance; :func:`~fedpeft.privacy.filter.admits` is for others).
    For ``poisson``, above it by less than 0.1 %, typically 0.01 %, where epsilon is at
    least 0.01, the sampling rate at least 0.001 and delta at least 1,000 times the
    least that is accepted; by a few percent elsewhere. For ``fixed`` the same holds of
    one step and at rate 1; many steps are bounded by data that are worst in both
    directions at once (up to 18 % above what some data reach, in what was measured).
    Steps with equal parameters are one composition, however a history divides them: ten
    rounds give the same number, bit for bit, as all at once. ``inf`` if any release had
    no noise, or next to none (:attr:`~Composition.noise_to_change` below 0.01); 0.0 for
    no releases.

    Args:
        history: the releases; order does not matter.
        delta: in (0, 1).

    Raises:
        ValueError: for a delta outside (0, 1) or so small that double precision cannot
            resolve it (below 1.8e-15 a step), for more than :data:`MAX_STEPS` steps, or
            for releases of different relations.

    Source:
        Koskela et al. (2020), https://arxiv.org/abs/1906.03049; a step's distribution
        and its sources: :mod:`fedpeft.privacy.loss`.
    """
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta}.")
    return _epsilon(merged(history), delta)


def merged(history: Iterable[Composition]) -> tuple[Composition, ...]:
    """Returns the history with one entry for each set of parameters, sorted.

    The steps of equal parameters are added up; entries of no steps are left out.
    """
    steps: defaultdict[tuple[float, float, Sampling], int] = defaultdict(int)
    for done in history:
        if done.steps:
            rate = max(float(done.sampling_rate), _LEAST_RATE)
            steps[float(done.noise_multiplier), rate, done.sampling] += done.steps
    return tuple(
        Composition(noise_multiplier, sampling_rate, count, sampling)
        for (noise_multiplier, sampling_rate, sampling), count in sorted(steps.items())
    )


def most_steps(delta: float) -> int:
    """Returns the length of the longest history that :func:`epsilon` accounts.

    >>> most_steps(1e-5), most_steps(1e-12)
    (1000000, 562)
    """
    return min(MAX_STEPS, int(delta / (2 * ROUNDING_A_STEP)))


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Composition, ...], delta: float) -> float:
    """Refines the grid until it no longer matters; every grid gives an upper bound."""
    if not history:
        return 0.0
    if any(done.noise_to_change < _NO_NOISE for done in history):
        return math.inf
    if len({done.relation for done in history}) > 1:
        raise ValueError(
            "Expected releases of one neighbouring relation, got poisson and fixed "
            "samples: epsilons of different relations are never added."
        )
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
        done.steps * (done.sampling_rate / done.noise_to_change) ** 2
        for done in history
    )
    widest = max(
        largest_loss(done.noise_to_change, done.sampling_rate, tail) for done in history
    )
    return max(_FIRST_SHARE * math.sqrt(square / steps), widest / _FIRST_CELLS)


def _loss(history: tuple[Composition, ...], interval: float, tail: float) -> Any:
    """Returns the pessimistic privacy loss distribution of a history, both ways.

    Neighbours are composed first: most of the convolutions are then short.
    """
    parts = [_composed(done, interval, tail) for done in history]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        odd = parts[len(parts) & ~1 :]
        parts = [left.compose(right) for left, right in pairs] + odd
    return parts[0]


def _composed(done: Composition, interval: float, tail: float) -> Any:
    """Returns the privacy loss distribution of equal releases."""
    loss = step_loss(
        done.noise_to_change,
        done.sampling_rate,
        done.sampling,
        interval=interval,
        tail=tail,
    )
    return loss if done.steps == 1 else loss.self_compose(done.steps)


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
