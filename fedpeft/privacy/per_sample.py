"""Per-sample gradients: one row an example, written while autograd runs backward.

A *tap* sits on an operation's output and leaves it as it is. In the backward pass it is
handed the gradient of that output, in which the examples still lie side by side, and
writes each example's parameter gradient into its own row. The parameters themselves
enter the forward pass detached, so autograd never computes their summed, useless
gradient: that saving pays for the rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.rows import Rows

WriteFn = Callable[..., None]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        anchor: nn.Parameter,
        write: WriteFn,
        *saved: torch.Tensor,
    ) -> torch.Tensor:
        # Through save_for_backward, so that activation checkpointing keeps its say.
        ctx.save_for_backward(*saved)
        ctx.write = write
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing recomputes on this access
        ctx.write(gradient, *saved)
        return gradient, None, None, *(None for _ in saved)


def tap(
    output: torch.Tensor,
    anchor: nn.Parameter,
    write: WriteFn,
    *saved: torch.Tensor,
) -> torch.Tensor:
    """Returns `output`; its gradient will be handed to ``write(gradient, *saved)``.

    Args:
        output: an operation's output, shape ``(batch, ...)``.
        anchor: one of the operation's parameters. It receives no gradient; it makes
            autograd visit this operation even where nothing below it is trainable.
        write: adds to the rows.
        saved: tensors that `write` needs.
    """
    # A hook does the same for less. It would keep `saved` from checkpointing and from
    # autograd's watch over changes in place, and is lost when a view is changed so.
    if not saved and output.requires_grad and not output._is_view():
        output.register_hook(write)  # type: ignore[no-untyped-call]
        return output
    result: torch.Tensor = _Tap.apply(output, anchor, write, *saved)  # type: ignore[no-untyped-call]
    return result


class GradientSource(ABC):
    """Where the per-sample gradients of a model come from."""

    @abstractmethod
    def bind(self, model: nn.Module, operations: list[Operation]) -> None:
        """Prepares the model, whose trainable parameters the operations cover.

        Raises:
            ValueError: for an operation that this source cannot do.
        """

    @abstractmethod
    def backward(self, losses: torch.Tensor) -> Rows:
        """Returns the gradients of losses, shape ``(batch,)``, valid until the next.

        Raises:
            ValueError: if a gradient is missing or not per sample.
        """
