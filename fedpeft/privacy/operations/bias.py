"""A trainable bias on an otherwise frozen layer."""

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.per_sample import Rows, tap


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``db = sum_t g_t``, whatever the layer computes before it adds b.

    Shapes: y ``(batch, features)`` or ``(batch, ..., features)``.
    """
    module, bias = operation.module, operation.parameters["bias"]

    def write(gradient: torch.Tensor) -> None:
        rows.write(bias, gradient if gradient.dim() == 2 else _sum_positions(gradient))

    def linear(x: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.Linear)
        return tap(F.linear(x, module.weight, bias.detach()), bias, write)

    def layer_norm(x: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.LayerNorm)
        shape, weight = module.normalized_shape, module.weight
        y = F.layer_norm(x, list(shape), weight, bias.detach(), module.eps)
        return tap(y, bias, write)

    if isinstance(module, nn.Linear):
        return linear
    if isinstance(module, nn.LayerNorm):
        return layer_norm
    raise ValueError(f"Expected a linear or norm layer, got {type(module).__name__}.")


def _sum_positions(gradient: torch.Tensor) -> torch.Tensor:
    """Sums ``(batch, ..., features)`` over all but the first and last dimension."""
    return gradient.flatten(1, -2).sum(1)
