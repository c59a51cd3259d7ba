"""``y = x W^T + b`` with trainable W and, if there is one, b."""

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``dW = sum_t g_t x_t^T`` and ``db = sum_t g_t``.

    Low-rank products (LoRA) and bottleneck adapters are two of these in a row. One
    vector an example gives a product of rank one, of which the factors are kept.

    Shapes: x ``(batch, in)`` or ``(batch, ..., in)``.
    """
    module = operation.module
    if not isinstance(module, nn.Linear):
        raise ValueError(f"Expected nn.Linear, got {type(module).__name__}.")
    weight = operation.parameters["weight"]
    bias = operation.parameters.get("bias")

    def write(gradient: torch.Tensor, x: torch.Tensor) -> None:
        x = x.to(gradient.dtype)
        if x.dim() == 2:
            rows.write_outer(weight, gradient, x)
        else:
            gradient, x = gradient.flatten(1, -2), x.flatten(1, -2)
            rows.write(weight, torch.bmm(gradient.transpose(1, 2), x))
        if bias is not None:
            rows.write(bias, gradient if gradient.dim() == 2 else gradient.sum(1))

    def apply(x: torch.Tensor) -> torch.Tensor:
        constant = None if module.bias is None else module.bias.detach()
        return tap(F.linear(x, weight.detach(), constant), weight, write, x)

    return apply
