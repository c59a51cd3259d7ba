"""``z = scale * y + shift`` with the pairs of a pool that each example has chosen."""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward, sum_positions
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


@runtime_checkable
class Chooses(Protocol):
    """What the module must offer: which entries the examples at hand have chosen.

    Its forward pass uses the mean of an example's entries, and is the identity where
    there are none.
    """

    @property
    def indices(self) -> torch.Tensor | None:
        """Shape ``(batch, top_k)``, distinct entries for each example."""


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: SSF's gradients, shared out equally among the entries chosen.

    An entry that an example has not chosen gets exactly zero. As a product of the
    example's shares and one gradient a feature it is of rank one, of which the factors
    are kept: it costs no more than SSF, however large the pool.

    Shapes: scale and shift ``(entries, features)``, y ``(batch, features)`` or
    ``(batch, ..., features)``.

    Raises:
        ValueError: for a module that does not say what is chosen.
    """
    module = operation.module
    if not isinstance(module, Chooses):
        raise ValueError(
            f"Expected a module with indices, got {type(module).__name__}, which may "
            "compute something else."
        )
    chooses: Chooses = module
    scale, shift = operation.parameters["scale"], operation.parameters["shift"]

    def write(gradient: torch.Tensor, y: torch.Tensor, indices: torch.Tensor) -> None:
        shares = torch.zeros(len(indices), len(scale), device=gradient.device)
        shares.scatter_(1, indices, 1 / indices.shape[1])
        rows.write_outer(scale, shares, sum_positions(gradient * y))
        rows.write_outer(shift, shares, sum_positions(gradient))

    def apply(y: torch.Tensor) -> torch.Tensor:
        indices = chooses.indices
        if indices is None:
            return y
        factor, offset = (
            F.embedding(indices, pool.detach()).mean(1).to(y.dtype)
            for pool in (scale, shift)
        )
        wide = (len(indices), *(1 for _ in y.shape[2:]), -1)
        z = torch.addcmul(offset.view(wide), y, factor.view(wide))
        return tap(z, scale, write, y, indices)

    return apply
