"""Which values of a group are kept."""

import math
from fractions import Fraction

import torch


def check_density(density: float) -> None:
    """Raises ValueError unless ``0 < density <= 1``."""
    if not 0 < density <= 1:
        raise ValueError(f"Expected 0 < density <= 1, got {density}.")


def num_kept(density: float, size: int) -> int:
    """Returns ``ceil(density * size)``, in decimal as the configuration says it.

    In binary, 0.07 * 100 is a little above 7, and an eighth value would be kept.

    >>> num_kept(0.07, 100), num_kept(0.2, 1), num_kept(0.2, 0)
    (7, 1, 0)
    """
    return math.ceil(Fraction(str(float(density))) * size)


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Marks `count` values of largest magnitude; among equals, the first ones.

    Args:
        values: shape ``(size,)``.
        count: from 0 to size.

    Returns:
        A boolean tensor of shape ``(size,)`` with exactly `count` true entries.

    >>> largest(torch.tensor([1.0, -2.0, 2.0, 2.0]), 2)
    tensor([False,  True,  True, False])
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    magnitudes = values.abs()
    threshold = magnitudes.kthvalue(len(values) - count + 1).values
    marked = magnitudes > threshold
    ties = (magnitudes == threshold).nonzero().squeeze(1)
    marked[ties[: count - int(marked.sum())]] = True
    return marked
