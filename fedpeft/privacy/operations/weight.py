"""A linear layer whose weight is a function of a few trainable values."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.operations.linear import products
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows
from fedpeft.tensors import Tensors

PullBack = Callable[[torch.Tensor, torch.Tensor], Tensors]
"""Output gradients ``(batch, positions, out)`` and inputs ``(batch, positions, in)`` ->
each parameter's rows, shape ``(batch, *parameter.shape)``."""


@runtime_checkable
class DerivesWeight(Protocol):
    """What the module must offer.

    ``weight_from`` maps the operation's parameters, by name, to the weight, shape
    ``(out, in)``: differentiable, and of nothing else that trains. The module's forward
    pass is ``F.linear(x, weight, bias)``; the bias is frozen or None.
    """

    @property
    def bias(self) -> torch.Tensor | None:
        """Added to the product."""

    def weight_from(self, parameters: Tensors) -> torch.Tensor:
        """Returns the weight."""


@runtime_checkable
class PullsBack(Protocol):
    """What it may offer besides, where there is a shorter way than by the weight."""

    def pull_back(self, gradient: torch.Tensor, x: torch.Tensor) -> Tensors:
        """Returns the rows; see `PullBack`."""


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``G = sum_t g_t x_t^T``, then the weight function's pullback of G.

    Exact, since the gradient of the parameters is linear in G. It costs one G an
    example, unless the module pulls back in its own way.

    Shapes: x ``(batch, in)`` or ``(batch, ..., in)``.

    Raises:
        ValueError: for a module that does not say how its weight comes about.
    """
    module, parameters = operation.module, operation.parameters
    if not isinstance(module, DerivesWeight):
        raise ValueError(
            f"Expected a module with weight_from and bias, got "
            f"{type(module).__name__}, which may compute something else."
        )
    derives: DerivesWeight = module
    anchor = next(iter(parameters.values()))

    def constants() -> Tensors:
        return {name: parameter.detach() for name, parameter in parameters.items()}

    def by_weight(gradient: torch.Tensor, x: torch.Tensor) -> Tensors:
        weight, pull_back = torch.func.vjp(derives.weight_from, constants())  # type: ignore[misc]
        total = products(gradient, x).to(weight.dtype)
        pulled: Tensors = torch.func.vmap(lambda one: pull_back(one)[0])(total)
        return pulled

    pull_back: PullBack = (
        module.pull_back if isinstance(module, PullsBack) else by_weight
    )

    def write(gradient: torch.Tensor, x: torch.Tensor) -> None:
        x = x.to(gradient.dtype)
        pulled = pull_back(_positions(gradient), _positions(x))
        for name, parameter in parameters.items():
            rows.write(parameter, pulled[name])

    def apply(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, derives.weight_from(constants()), derives.bias)
        return tap(y, anchor, write, x)

    return apply


def _positions(values: torch.Tensor) -> torch.Tensor:
    """Returns ``(batch, positions, features)``."""
    return values.unsqueeze(1) if values.dim() == 2 else values.flatten(1, -2)
