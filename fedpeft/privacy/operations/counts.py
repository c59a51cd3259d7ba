"""Counts that travel in the gradient: what passes through stays as it is."""

from typing import Protocol, runtime_checkable

import torch

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


@runtime_checkable
class Counts(Protocol):
    """What the module must offer. Its forward pass is the identity."""

    @property
    def increments(self) -> torch.Tensor | None:
        """What each example adds to the counts, shape ``(batch, counts)``, or None."""


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: minus the example's increments, if the example has a gradient.

    Shapes: y ``(batch, ...)`` -> the same.

    Raises:
        ValueError: for a module that does not count.
    """
    module, counts = operation.module, operation.parameters["counts"]
    if not isinstance(module, Counts):
        raise ValueError(
            f"Expected a module with increments, got {type(module).__name__}, which "
            "may compute something else."
        )
    counter: Counts = module

    def write(gradient: torch.Tensor, increments: torch.Tensor) -> None:
        takes_part = gradient.flatten(1).ne(0).any(1, keepdim=True)
        rows.write(counts, -increments * takes_part)

    def apply(y: torch.Tensor) -> torch.Tensor:
        increments = counter.increments
        return y if increments is None else tap(y, counts, write, increments)

    return apply
