"""``z = scale * y + shift`` behind a frozen layer."""

import torch

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.per_sample import Rows, tap


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``dscale = sum_t g_t * y_t`` and ``dshift = sum_t g_t``.

    Shapes: y ``(batch, features)`` or ``(batch, ..., features)``. The module offers the
    frozen layer as ``base``.
    """
    base = operation.module.get_submodule("base")
    scale, shift = operation.parameters["scale"], operation.parameters["shift"]

    def write(gradient: torch.Tensor, y: torch.Tensor) -> None:
        product = gradient * y
        if gradient.dim() > 2:
            gradient = gradient.flatten(1, -2).sum(1)
            product = product.flatten(1, -2).sum(1)
        rows.write(scale, product)
        rows.write(shift, gradient)

    def apply(x: torch.Tensor) -> torch.Tensor:
        y = base(x)
        factor, offset = scale.detach().to(y.dtype), shift.detach().to(y.dtype)
        return tap(torch.addcmul(offset, y, factor), scale, write, y)

    return apply
