"""Per-sample gradients: one row an example, written while autograd runs backward.

A *tap* is the identity on an operation's output. In the backward pass it is handed the
gradient of that output, in which the examples still lie side by side, and writes each
example's parameter gradient into its own row. The parameters themselves enter the
forward pass detached, so autograd never computes their summed, useless gradient: that
saving pays for the rows.

A linear layer that sees one vector an example (a head behind pooling) has gradients of
rank one. They are kept as their two factors: with many classes a row would be larger
than all activations, its norm and the clipped sum follow from the factors alone.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fedpeft.interfaces import Operation

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

    **Guarantees**: a backward pass between :meth:`start` and :meth:`finish` has written
    every parameter with the batch size announced, or an error was raised. Nothing that
    depends on data decides. The buffer is reused from pass to pass.

    Args:
        parameters: in the order of the columns.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._batch = 0
        self._buffer = torch.zeros(0, 0)
        self._columns: dict[nn.Parameter, slice] = {}
        # What has no columns yet is kept by itself until the pass ends.
        self._loose: dict[nn.Parameter, torch.Tensor] = {}
        self._factors: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}
        self._written: set[nn.Parameter] = set()

    def start(self, batch: int) -> None:
        """Announces a backward pass over `batch` examples."""
        if self._buffer.shape[0] < batch:
            self._allocate(batch)
        self._batch = batch
        self._written.clear()
        self._factors.clear()
        self._loose.clear()

    def write(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Stores ``(batch, *parameter.shape)``; adds, where a module is used twice.

        Raises:
            ValueError: if the shape is another. A first dimension of one in place of
                the batch would mean that nothing is clipped by example.
        """
        self._check(gradient, *parameter.shape)
        flat = gradient.reshape(self._batch, -1)
        if parameter in self._factors:
            flat = flat + _outer(*self._factors.pop(parameter))
            self._written.discard(parameter)
        place = self._place(parameter)
        if parameter in self._written:
            place.add_(flat)
        else:
            place.copy_(flat)
            self._written.add(parameter)

    def write_outer(
        self, weight: nn.Parameter, gradient: torch.Tensor, x: torch.Tensor
    ) -> None:
        """Stores the products of ``(batch, out)`` and ``(batch, in)`` as factors."""
        self._check(gradient, weight.shape[0])
        self._check(x, weight.shape[1])
        if weight in self._written:
            self.write(weight, _outer(gradient, x).view(-1, *weight.shape))
        else:
            self._factors[weight] = gradient.float(), x.detach().float()
            self._written.add(weight)

    def finish(self) -> None:
        """Ends the backward pass.

        Raises:
            ValueError: if a parameter received no gradient.
        """
        missing = len(self.parameters) - len(self._written)
        if missing:
            raise ValueError(
                f"Expected gradients for {len(self.parameters)} parameters, {missing} "
                "received none: a trainable part of the model was not used."
            )
        if self._loose:
            values = {p: self._place(p).clone() for p in self._columns} | self._loose
            self._columns = _layout(p for p in self.parameters if p in values)
            self._loose.clear()
            self._allocate(self._batch)
            for parameter, value in values.items():
                self._place(parameter).copy_(value)

    def dense(self) -> torch.Tensor:
        """Returns all rows, shape ``(batch, total)``, factors multiplied out."""
        if not self._factors:
            return self._rows
        parts = [
            _outer(*self._factors[p]) if p in self._factors else self._place(p)
            for p in self.parameters
        ]
        return torch.cat(parts, 1)

    def clipped_sum(self, bound: float) -> torch.Tensor:
        """Returns what :func:`clipped_sum` gives of :meth:`dense`, without making it.

        A row that is not finite is zeroed in place.
        """
        squares = torch.linalg.vector_norm(self._rows, dim=1).square_()
        for gradient, x in self._factors.values():
            squares += (gradient.norm(dim=1) * x.norm(dim=1)).square_()
        norms = squares.sqrt_()
        finite = norms.isfinite()
        if not finite.all():
            self._zero(~finite)
            norms = norms.where(finite, 0.0)
        weights = clipping_weights(norms, bound)
        total = torch.mv(self._rows.t(), weights)
        if not self._factors:
            return total
        parts = []
        for parameter in self.parameters:
            if parameter in self._factors:
                gradient, x = self._factors[parameter]
                parts.append(((gradient.t() * weights) @ x).flatten())
            else:
                parts.append(total[self._columns[parameter]])
        return torch.cat(parts)

    @property
    def _rows(self) -> torch.Tensor:
        return self._buffer[: self._batch]

    def _place(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter in self._columns:
            return self._buffer[: self._batch, self._columns[parameter]]
        shape = (self._batch, parameter.numel())
        if parameter not in self._loose:
            self._loose[parameter] = torch.zeros(shape, device=parameter.device)
        return self._loose[parameter]

    def _allocate(self, batch: int) -> None:
        width = sum(p.numel() for p in self._columns)
        device = self.parameters[0].device
        self._buffer = torch.zeros(batch, width, device=device)

    def _zero(self, rows: torch.Tensor) -> None:
        for tensor in (self._rows, *(t for f in self._factors.values() for t in f)):
            tensor[rows] = 0.0

    def _check(self, gradient: torch.Tensor, *shape: int) -> None:
        expected = (self._batch, *shape)
        if gradient.shape != expected:
            raise ValueError(
                f"Expected per-sample gradients of shape {expected}, got "
                f"{tuple(gradient.shape)}: the operation mixes examples."
            )


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


def clipped_sum(rows: torch.Tensor, bound: float) -> torch.Tensor:
    """Returns the sum of rows, each scaled down to L2 norm `bound` if it is longer.

    **Guarantees**: each row's part is at most `bound` long, up to the rounding of a
    single-precision norm, which is below 1e-5 of it. A row with a non-finite value or
    norm is zeroed (in place).

    Shapes: rows ``(batch, total)`` -> ``(total,)``.

    >>> clipped_sum(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    tensor([0.9000, 1.2000])
    """
    norms = torch.linalg.vector_norm(rows, dim=1)
    finite = norms.isfinite()
    if not finite.all():
        rows[~finite] = 0.0
        norms = norms.where(finite, 0.0)
    return torch.mv(rows.t(), clipping_weights(norms, bound))


def clipping_weights(norms: torch.Tensor, bound: float) -> torch.Tensor:
    """Returns the factor on each row; an infinite bound clips nothing."""
    if math.isinf(bound):
        return torch.ones_like(norms)
    return (bound / norms).clamp(max=1.0)


def _outer(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns ``(batch, out * in)``."""
    return (gradient.unsqueeze(2) * x.unsqueeze(1)).flatten(1)


def _layout(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, slice]:
    columns, start = {}, 0
    for parameter in parameters:
        columns[parameter] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return columns
