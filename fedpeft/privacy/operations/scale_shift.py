"""``z = scale * y``, with a shift or without."""

import torch

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward, sum_positions
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``dscale = sum_t g_t * y_t`` and ``dshift = sum_t g_t``.

    Shapes: y ``(batch, features)`` or ``(batch, ..., features)``.
    """
    scale = operation.parameters["scale"]
    shift = operation.parameters.get("shift")

    def write(gradient: torch.Tensor, y: torch.Tensor) -> None:
        rows.write(scale, sum_positions(gradient * y))
        if shift is not None:
            rows.write(shift, sum_positions(gradient))

    def apply(y: torch.Tensor) -> torch.Tensor:
        factor = scale.detach().to(y.dtype)
        if shift is None:
            return tap(y * factor, scale, write, y)
        z = torch.addcmul(shift.detach().to(y.dtype), y, factor)
        return tap(z, scale, write, y)

    return apply
