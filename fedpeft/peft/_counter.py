"""Counting what examples choose, in a way that is charged for by construction."""

from typing import Any

import torch
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.peft._pools import Choice


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, counts: torch.Tensor, increments: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(increments)
        return y.view_as(y)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        (increments,) = ctx.saved_tensors
        takes_part = gradient.flatten(1).ne(0).any(1, keepdim=True)
        return gradient, -(increments * takes_part).sum(0), None


class Counter(nn.Module):
    """Leaves what passes through as it is, and counts the entries chosen.

    The counts are trainable tensors that the output does not depend on. The gradient of
    an example is minus `scale` where it has chosen, if it has a gradient at all: plain
    SGD then moves the counts by ``learning_rate * scale`` times the share of the batch
    that chose an entry. Under DP they are a part of each example's gradient, clipped
    and noised with all the rest, so that nothing is told beside.

    Args:
        choice: what the examples have chosen.
        pool_size: the number of entries.
        scale: how much of the clipping norm a count may take.
    """

    def __init__(self, choice: Choice, pool_size: int, scale: float) -> None:
        super().__init__()
        self.choice = choice
        self.scale = scale
        self.pool_counts = nn.Parameter(torch.zeros(pool_size))

    @property
    def increments(self) -> torch.Tensor | None:
        """What each example adds, shape ``(batch, pool_size)``; None without choice."""
        indices = self.choice.indices
        if indices is None:
            return None
        size = (len(indices), len(self.pool_counts))
        zeros = torch.zeros(size, device=indices.device)
        return zeros.scatter_(1, indices, self.scale)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Returns `y`."""
        increments = self.increments
        if increments is None:
            return y
        counted: torch.Tensor = _Counted.apply(y, self.pool_counts, increments)  # type: ignore[no-untyped-call]
        return counted

    @property
    def operation(self) -> Operation:
        """How its parameter acts."""
        return Operation(self, "counts", {"counts": self.pool_counts})
