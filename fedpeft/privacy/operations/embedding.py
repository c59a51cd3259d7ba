"""A table of trainable rows that are looked up by id."""

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: row i receives the sum of the gradients where the id is i.

    Shapes: ids ``(batch, ...)`` -> ``(batch, ..., features)``. Ids that all examples
    share, such as positions of shape ``(1, tokens)``, are refused in the backward pass
    of any batch but one of a single example: their gradients come summed already.

    Raises:
        ValueError: for a table that is no plain look-up.
    """
    module, weight = operation.module, operation.parameters["weight"]
    computes = type(module).forward
    if not isinstance(module, nn.Embedding) or computes is not nn.Embedding.forward:
        raise ValueError(f"Expected nn.Embedding, got {type(module).__name__}.")
    if module.scale_grad_by_freq or module.max_norm is not None or module.sparse:
        raise ValueError(
            "Expected an embedding without max_norm, scale_grad_by_freq and sparse: "
            "they mix examples or change the table by themselves."
        )
    padding = module.padding_idx

    def write(gradient: torch.Tensor, ids: torch.Tensor) -> None:
        batch, size = ids.shape[0], weight.shape[0]
        offsets = size * torch.arange(batch, device=ids.device)
        places = (ids.flatten(1) + offsets.unsqueeze(1)).flatten()
        flat = gradient.reshape(len(places), -1).float()
        total = flat.new_zeros(batch * size, flat.shape[1])
        total.index_add_(0, places, flat)
        total = total.view(batch, size, -1)
        if padding is not None:
            total[:, padding] = 0.0
        rows.write(weight, total)

    def apply(ids: torch.Tensor) -> torch.Tensor:
        if ids.dim() < 2:
            raise ValueError(
                f"Expected ids of shape (batch, ...), got {tuple(ids.shape)}: whose "
                "each is would be unknown."
            )
        return tap(F.embedding(ids, weight.detach()), weight, write, ids)

    return apply
