"""What every bound returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Scores: TypeAlias = Sequence[float] | Array


@dataclass(frozen=True)
class LowerBound:
    """One lower bound on the epsilon of what was observed.

    Attributes:
        name: such as ``clopper-pearson``.
        epsilon: at least this, at the delta asked for; 0 says nothing, infinity that no
            epsilon at all explains the scores.
        alpha: the probability with which the bound may exceed the true epsilon.
        ceiling: the largest epsilon that so many canaries could ever show, at perfect
            separation; infinity for an estimate, which extrapolates.
        assumption: what it rests on beside the scores being those of canaries.
        n: the number of canaries.
        is_estimate: whether it is asymptotic only. Then nothing may be decided by it.
    """

    name: str
    epsilon: float
    alpha: float
    ceiling: float
    assumption: str
    n: int
    is_estimate: bool = False


def check_delta(delta: float, *, zero_is_allowed: bool) -> None:
    """Refuses a delta at which the bound is not defined."""
    if zero_is_allowed and not 0 <= delta < 1:
        raise ValueError(f"Expected 0 <= delta < 1, got {delta}.")
    if not zero_is_allowed and not 0 < delta < 1:
        raise ValueError(
            f"Expected 0 < delta < 1, got {delta}: no Gaussian noise has a finite "
            "epsilon at delta 0."
        )
