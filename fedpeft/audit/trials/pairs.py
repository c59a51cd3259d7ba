"""Pairs of neighbouring data sets, each the worst case of one mistake.

Of a correct step the sums of a pair differ by at most one clipping norm along a known
direction. So a score is the noised sum along it, from where it lies without the canary,
in standard deviations of the noise: below half a norm it says "out", else "in". That
threshold is fixed here, before anything is run.

The rows are in units of the clipping norm.
"""

from dataclasses import dataclass

import torch

from fedpeft.privacy import Composition, Plan

_PHYSICAL_BATCH = 8
_HUGE = 1000.0
_LOW_NOISE = 0.25
"""So little that a score tells almost surely whether the canary was drawn."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One trial: what is compared, and how a release is scored.

    Attributes:
        trial: its name.
        looks_for: the mistake that it would show, for the report.
        without: rows of the smaller data set, shape ``(examples, total)``.
        canary: the rows that one unit adds.
        direction: the unit vector along which sums are looked at.
        offset: of a correct sum without the canary along it, in clipping norms.
        canary_first: whether the canary stands in front of the others.
        of_silence: whether all that is asked of a release is if it moved anything.
        noise_multiplier: in place of the plan's; None for the plan's.
        sampling_rate: of the units; 1 says that the canary is known to be drawn.
    """

    trial: str
    looks_for: str
    without: torch.Tensor
    canary: torch.Tensor
    direction: torch.Tensor
    offset: float = 0.0
    canary_first: bool = False
    of_silence: bool = False
    noise_multiplier: float | None = None
    sampling_rate: float = 1.0

    def rows(self, with_canary: bool) -> tuple[torch.Tensor, list[int]]:
        """Returns one of the two data sets, and whose each row is."""
        others, number = self.without, len(self.without)
        if not with_canary:
            return others, list(range(number))
        mine = [number] * len(self.canary)
        if self.canary_first:
            return torch.cat([self.canary, others]), [*mine, *range(number)]
        return torch.cat([others, self.canary]), [*range(number), *mine]

    def claim(self, plan: Plan) -> Composition:
        """Returns what the accountant makes of one release of this trial."""
        noise = self.noise_multiplier or plan.noise_multiplier
        return Composition(noise, self.sampling_rate, steps=1)

    def threshold(self, plan: Plan) -> float:
        """Returns the score from which on a release counts as one with the canary."""
        return 0.5 if self.of_silence else 0.5 / self.claim(plan).noise_multiplier

    @property
    def failure_score(self) -> float:
        """What a client's failure is scored: a silence, or the loudest canary."""
        return 0.0 if self.of_silence else _HUGE

    def scores(self, sums: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Scores noised sums, shape ``(releases, total)``; in doubles.

        A release that is no number, or beyond every bound, is scored as a huge one.
        """
        if self.of_silence:
            return sums.ne(0).any(1).double()
        along = sums.double() @ self.direction.double() / plan.clipping_norm
        scores = (along - self.offset) / self.claim(plan).noise_multiplier
        return scores.nan_to_num(_HUGE, _HUGE, -_HUGE)


def pairs(plan: Plan, direction: torch.Tensor) -> list[Pair]:
    """Returns the trials of a plan.

    Args:
        plan: of the run.
        direction: a unit vector with a part in every tensor, shape ``(total,)``.
    """
    size = physical_batch(plan)
    found = [*_of_any_unit(direction, size), _empty(direction, plan)]
    if plan.is_dp_sgd and plan.sampling_rate < 1:
        found.append(_drawn(direction, plan))
    if plan.max_examples is not None:
        found.append(_person(direction, size))
    return found


def physical_batch(plan: Plan) -> int:
    """Returns how many canaries pass through the model at once; a person's all do."""
    return max(_PHYSICAL_BATCH, plan.max_examples or 1)


def _of_any_unit(v: torch.Tensor, size: int) -> list[Pair]:
    half = 0.5 * v
    nan = v.clone()
    nan[0] = torch.nan
    return [
        Pair(
            "gradient canary",
            "what is not clipped, or clipped tensor by tensor; too little noise",
            without=_rows(half),
            canary=_rows(_HUGE * v),
            direction=v,
            offset=0.5,
        ),
        Pair(
            "last of a crowd",
            "a physical batch that is treated unlike the first",
            without=_rows(half, size + 4),
            canary=_rows(_HUGE * v),
            direction=v,
            offset=(size + 4) / 2,
        ),
        Pair(
            "flip",
            "clipping of the sum in place of each part",
            without=_rows(half, 2),
            canary=_rows(-2 * v),
            direction=-v,
            offset=-1.0,
        ),
        Pair(
            "not a number",
            "a part that is not finite and drops others with it",
            without=_rows(half, size - 1),
            canary=_rows(nan),
            direction=-v,
            offset=-(size - 1) / 2,
        ),
        Pair(
            "first of the batch",
            "a unit that counts twice",
            without=_rows(-v),
            canary=_rows(v),
            direction=v,
            offset=-1.0,
            canary_first=True,
        ),
    ]


def _empty(v: torch.Tensor, plan: Plan) -> Pair:
    name = "empty batch" if plan.is_dp_sgd else "empty cohort"
    return Pair(
        name,
        "a step that is left out where there is nothing to add up",
        without=_rows(v, 0),
        canary=_rows(0.5 * v),
        direction=v,
        of_silence=True,
    )


def _drawn(v: torch.Tensor, plan: Plan) -> Pair:
    return Pair(
        "sampling",
        "batches drawn at another rate than the plan's",
        without=_rows(v, 0),
        canary=_rows(_HUGE * v),
        direction=v,
        noise_multiplier=_LOW_NOISE,
        sampling_rate=plan.sampling_rate,
    )


def _person(v: torch.Tensor, size: int) -> Pair:
    """More rows than the plan takes of one, and than pass through a model at once."""
    return Pair(
        "a person of many rows",
        "a person's rows that are clipped one by one, or all let in",
        without=_rows(0.5 * v),
        canary=_rows(v, 3 * size),
        direction=v,
        offset=0.5,
    )


def _rows(row: torch.Tensor, count: int = 1) -> torch.Tensor:
    """Repeats a row; shape ``(count, total)``."""
    return row.expand(count, -1)
