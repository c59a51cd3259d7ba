"""Trainable tokens that every example gets: a prompt, a layer's prefix."""

import torch

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: the gradient of the example's own copy, which costs nothing.

    The module maps a batch size to ``(batch, *tokens.shape)``, a view. The gradient of
    that view is still apart by example; autograd's next step would be to sum it.
    """
    tokens = operation.parameters["tokens"]

    def write(gradient: torch.Tensor) -> None:
        rows.write(tokens, gradient)

    def apply(batch: int) -> torch.Tensor:
        copies = tokens.detach().expand(batch, *tokens.shape)
        return tap(copies, tokens, write)

    return apply
