"""Rows of per-sample gradients, and their clipped sum.

A linear layer that sees one vector an example (a head behind pooling) has gradients of
rank one. They are kept as their two factors: with many classes a row would be larger
than all activations, its norm and the clipped sum follow from the factors alone.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn


class Rows:
    """Per-sample gradients of all trainable parameters, shape ``(batch, total)``.

    **Guarantees**: a backward pass between :meth:`start` and :meth:`finish` has written
    every parameter with the batch size announced, or an error was raised. Nothing that
    depends on data decides. What is kept grows while activations go: the peak of a
    step's memory stays where it is without privacy.

    Args:
        parameters: in the order of the columns.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._batch = 0
        self._parts: dict[nn.Parameter, torch.Tensor] = {}
        self._factors: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}
        self._matrix = torch.zeros(0, 0)

    def start(self, batch: int) -> None:
        """Announces a backward pass over `batch` examples."""
        self._batch = batch
        self._parts.clear()
        self._factors.clear()

    def write(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Stores ``(batch, *parameter.shape)``; adds, where a module is used twice.

        Raises:
            ValueError: if the shape is another. A first dimension of one in place of
                the batch would mean that nothing is clipped by example.
        """
        self._check(gradient, parameter.shape)
        part = gradient.detach().reshape(self._batch, parameter.numel()).float()
        if parameter in self._factors:
            part = part + _outer(*self._factors.pop(parameter))
        elif parameter in self._parts:
            part = part + self._parts[parameter]
        self._parts[parameter] = part

    def write_outer(
        self, weight: nn.Parameter, gradient: torch.Tensor, x: torch.Tensor
    ) -> None:
        """Stores the products of ``(batch, out)`` and ``(batch, in)`` as factors."""
        self._check(gradient, weight.shape[:1])
        self._check(x, weight.shape[1:])
        if weight in self._parts or weight in self._factors:
            self.write(weight, _outer(gradient, x).view(-1, *weight.shape))
        else:
            self._factors[weight] = gradient.float(), x.detach().float()

    def finish(self) -> None:
        """Ends the backward pass.

        Raises:
            ValueError: if a parameter received no gradient.
        """
        missing = len(self.parameters) - len(self._parts) - len(self._factors)
        if missing:
            raise ValueError(
                f"Expected gradients for {len(self.parameters)} parameters, {missing} "
                "received none: a trainable part of the model was not used."
            )
        parts = [self._parts[p] for p in self.parameters if p in self._parts]
        device = self.parameters[0].device
        self._matrix = torch.cat(
            [torch.zeros(self._batch, 0, device=device), *parts], 1
        )
        self._parts.clear()

    def backward(self, losses: torch.Tensor) -> None:
        """Runs backward from losses, shape ``(batch,)``; the taps write.

        Raises:
            ValueError: also if a parameter is used where no tap is: its rows would lack
                that part.
        """
        for parameter in self.parameters:
            parameter.grad = None
        self.start(losses.shape[0])
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self.finish()
        if any(parameter.grad is not None for parameter in self.parameters):
            raise ValueError(
                "Expected trainable parameters used in their operations alone, got "
                "one that something else uses as well, such as a tied weight."
            )

    def dense(self) -> torch.Tensor:
        """Returns all rows, shape ``(batch, total)``, factors multiplied out."""
        outer = {p: _outer(*factors) for p, factors in self._factors.items()}
        return self._in_order(self._matrix, outer) if outer else self._matrix

    def clipped_sum(self, bound: float) -> torch.Tensor:
        """Returns :func:`clipped_sum` of :meth:`dense`, without making it."""
        # The factors' lengths in double precision: one may be tiny, the other huge.
        squares = torch.linalg.vector_norm(self._matrix, dim=1).double().square_()
        for gradient, x in self._factors.values():
            lengths = gradient.double().norm(dim=1) * x.double().norm(dim=1)
            squares += lengths.square_()
        norms = squares.sqrt_().float()
        finite = norms.isfinite()
        if not finite.all():
            self._zero(~finite)
            norms = norms.where(finite, 0.0)
        weights = clipping_weights(norms, bound)
        total = torch.mv(self._matrix.t(), weights)
        sums = {
            parameter: ((gradient.t() * weights) @ x).flatten()
            for parameter, (gradient, x) in self._factors.items()
        }
        return self._in_order(total, sums) if sums else total

    def _in_order(
        self, columns: torch.Tensor, others: dict[nn.Parameter, torch.Tensor]
    ) -> torch.Tensor:
        """Puts the columns of factored parameters where they belong."""
        sizes = [p.numel() for p in self.parameters if p not in others]
        pieces = iter(torch.split(columns, sizes, -1))
        ordered = [others[p] if p in others else next(pieces) for p in self.parameters]
        return torch.cat(ordered, -1)

    def _zero(self, rows: torch.Tensor) -> None:
        """Never in place: a gradient may be expanded, and x is the caller's own."""
        keep = ~rows.unsqueeze(1)
        self._matrix = self._matrix.where(keep, 0.0)
        for weight, (gradient, x) in self._factors.items():
            self._factors[weight] = gradient.where(keep, 0.0), x.where(keep, 0.0)

    def _check(self, gradient: torch.Tensor, shape: torch.Size) -> None:
        if gradient.shape != (self._batch, *shape):
            raise ValueError(
                f"Expected per-sample gradients of shape {(self._batch, *shape)}, got "
                f"{tuple(gradient.shape)}: the operation mixes examples."
            )


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
