"""``y = x W^T + b`` with trainable W and, if there is one, b."""

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows

_NARROW = 16
"""With fewer columns a product takes several times as long on a CPU; few rows are no
such burden."""


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``dW = sum_t g_t x_t^T`` and ``db = sum_t g_t``.

    Low-rank products (LoRA) and bottleneck adapters are two of these in a row. One
    vector an example gives a product of rank one, of which the factors are kept.

    Shapes: x ``(batch, in)`` or ``(batch, ..., in)``.
    """
    module = operation.module
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not plain:
        raise ValueError(
            f"Expected nn.Linear, got {type(module).__name__}, which may compute "
            "something else."
        )
    weight = operation.parameters["weight"]
    bias = operation.parameters.get("bias")

    def write(gradient: torch.Tensor, x: torch.Tensor) -> None:
        x = x.to(gradient.dtype)
        if x.dim() == 2:
            rows.write_outer(weight, gradient, x)
        else:
            gradient, x = gradient.flatten(1, -2), x.flatten(1, -2)
            rows.write(weight, products(gradient, x))
        if bias is not None:
            rows.write(bias, gradient if gradient.dim() == 2 else gradient.sum(1))

    def apply(x: torch.Tensor) -> torch.Tensor:
        offset: torch.Tensor | None = module.bias  # type: ignore[assignment]
        constant = None if offset is None else offset.detach()
        return tap(F.linear(x, weight.detach(), constant), weight, write, x)

    return apply


def products(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums ``g_t x_t^T`` over positions, shape ``(batch, out, in)``."""
    if x.shape[2] < min(_NARROW, gradient.shape[2]):
        return torch.bmm(x.transpose(1, 2), gradient).transpose(1, 2)
    return torch.bmm(gradient.transpose(1, 2), x)
