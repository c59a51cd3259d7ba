"""What all rules share."""

from collections.abc import Callable
from typing import TypeAlias

import torch

Forward: TypeAlias = Callable[..., torch.Tensor]
"""A module's forward pass, with a tap on its output."""


def sum_positions(gradient: torch.Tensor) -> torch.Tensor:
    """Sums over all but the first and last dimension, at least in single precision.

    >>> sum_positions(torch.ones(2, 3, 4)).shape
    torch.Size([2, 4])
    """
    if gradient.dim() == 2:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.flatten(1, -2).sum(1, dtype=wide)
