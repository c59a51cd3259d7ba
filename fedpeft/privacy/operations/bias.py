"""A trainable bias on an otherwise frozen layer."""

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward, sum_positions
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``db = sum_t g_t``, whatever the layer computes before it adds b.

    Shapes: y ``(batch, features)`` or ``(batch, ..., features)``.

    Raises:
        ValueError: for a layer that is not plainly torch's own.
    """
    module, bias = operation.module, operation.parameters["bias"]

    def write(gradient: torch.Tensor) -> None:
        rows.write(bias, sum_positions(gradient))

    def linear(x: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.Linear)
        return tap(F.linear(x, module.weight, bias.detach()), bias, write)

    def layer_norm(x: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.LayerNorm)
        shape, weight = module.normalized_shape, module.weight
        y = F.layer_norm(x, list(shape), weight, bias.detach(), module.eps)
        return tap(y, bias, write)

    computes = type(module).forward
    if computes is nn.Linear.forward:
        return linear
    if computes is nn.LayerNorm.forward:
        return layer_norm
    raise ValueError(
        f"Expected nn.Linear or nn.LayerNorm, got {type(module).__name__}, which may "
        f"compute something else."
    )
