"""Trainable tokens that no text contains."""

import torch
from torch import nn

from fedpeft.interfaces import Operation


class VirtualTokens(nn.Module):
    """The same trainable tokens for every example.

    Args:
        start: initial values, of any shape.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.tokens = nn.Parameter(start)

    def forward(self, batch: int) -> torch.Tensor:
        """Returns one view an example, shape ``(batch, *start.shape)``."""
        return self.tokens.expand(batch, *self.tokens.shape)

    @property
    def operation(self) -> Operation:
        """How its parameter acts."""
        return Operation(self, "tokens", {"tokens": self.tokens})
