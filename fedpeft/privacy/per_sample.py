"""Per-sample gradients: one row an example, written while autograd runs backward.

A *tap* is the identity on an operation's output. In the backward pass it is handed the
gradient of that output, in which the examples still lie side by side, and writes each
example's parameter gradient into its own row. The parameters themselves enter the
forward pass detached, so autograd never computes their summed, useless gradient: that
saving pays for the rows.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

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
    result: torch.Tensor = _Tap.apply(output, anchor, write, *saved)  # type: ignore[no-untyped-call]
    return result


class Rows:
    """Per-sample gradients of all trainable parameters, shape ``(batch, total)``.

    **Guarantees**: :meth:`finish` returns rows in which every parameter was written
    with the batch size announced, or raises. Nothing that depends on data decides.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._slices: dict[nn.Parameter, slice] = {}
        self.total = 0
        for parameter in parameters:
            end = self.total + parameter.numel()
            self._slices[parameter] = slice(self.total, end)
            self.total = end
        self._buffer = torch.zeros(0, self.total)
        self._batch = 0
        self._written: set[nn.Parameter] = set()

    def start(self, batch: int, device: torch.device) -> None:
        """Announces a backward pass over `batch` examples; the buffer is reused."""
        if self._buffer.shape[0] < batch or self._buffer.device != device:
            self._buffer = torch.zeros(batch, self.total, device=device)
        self._batch = batch
        self._written.clear()

    def write(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Stores ``(batch, *parameter.shape)``; adds, where a module is used twice.

        Raises:
            ValueError: if the shape is another. A first dimension of one in place of
                the batch would mean that nothing is clipped by example.
        """
        expected = (self._batch, *parameter.shape)
        if gradient.shape != expected:
            raise ValueError(
                f"Expected per-sample gradients of shape {expected}, got "
                f"{tuple(gradient.shape)}: the operation mixes examples."
            )
        place = self._buffer[: self._batch, self._slices[parameter]]
        flat = gradient.reshape(self._batch, -1)
        if parameter in self._written:
            place.add_(flat)
        else:
            place.copy_(flat)
            self._written.add(parameter)

    def finish(self) -> torch.Tensor:
        """Returns the rows of the last backward pass, a view of the buffer.

        Raises:
            ValueError: if a parameter received no gradient.
        """
        missing = len(self._slices) - len(self._written)
        if missing:
            raise ValueError(
                f"Expected gradients for {len(self._slices)} parameters, {missing} "
                "received none: a trainable part of the model was not used."
            )
        return self._buffer[: self._batch]
