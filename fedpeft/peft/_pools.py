"""Pools: modules of which each example uses the entries that it has chosen."""

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation


class Choice:
    """Which entries of the pools the examples of the batch at hand have chosen.

    One object for the whole backbone, shared by all its pools: a copy of the backbone
    shares a copy of it. It is no part of any state, so that nothing of it travels. It
    stays until the next batch chooses: activation checkpointing reads it again.

    Attributes:
        indices: shape ``(batch, top_k)``; None while no pool takes part.
    """

    def __init__(self) -> None:
        self.indices: torch.Tensor | None = None


class PooledScaleShift(nn.Module):
    """``scale * y + shift`` with the mean of the pairs that each example has chosen.

    All pairs are the identity until they are trained. What makes them differ is that
    different examples choose them.

    Shapes: ``(batch, ..., features)`` -> the same.

    Args:
        choice: what the examples have chosen.
        pool_size: the number of pairs.
        features: size of the last dimension.
    """

    def __init__(self, choice: Choice, pool_size: int, features: int) -> None:
        super().__init__()
        self.choice = choice
        # By these names the server knows that the first dimension counts entries.
        self.pool_scale = nn.Parameter(torch.ones(pool_size, features))
        self.pool_shift = nn.Parameter(torch.zeros(pool_size, features))

    @property
    def indices(self) -> torch.Tensor | None:
        """The chosen entries, shape ``(batch, top_k)``."""
        return self.choice.indices

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Scales and shifts in the dtype of `y`; the identity without a choice."""
        if self.indices is None:
            return y
        scale, shift = (
            chosen_mean(pool, self.indices, y)
            for pool in (self.pool_scale, self.pool_shift)
        )
        return torch.addcmul(shift, y, scale)

    @property
    def operation(self) -> Operation:
        """How its parameters act."""
        parameters = {"scale": self.pool_scale, "shift": self.pool_shift}
        return Operation(self, "pool", parameters)


def chosen_mean(
    pool: torch.Tensor, indices: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Returns each example's mean entry, in the dtype of `y` and ready to broadcast.

    Shapes: pool ``(entries, features)``, indices ``(batch, top_k)``, y ``(batch, ...,
    features)`` -> ``(batch, 1, ..., features)``.
    """
    mean = F.embedding(indices, pool).mean(1).to(y.dtype)
    return mean.view(len(mean), *(1 for _ in y.shape[2:]), -1)


class PooledHead(nn.Module):
    """The mean of the linear heads of the entries that each example has chosen.

    One linear layer on the features put in each chosen entry's place, with zeros in all
    others': per-sample gradients are then those of any linear layer.

    Shapes: ``(batch, features)`` -> ``(batch, labels)``.
    """

    def __init__(
        self, choice: Choice, pool_size: int, features: int, labels: int
    ) -> None:
        super().__init__()
        self.choice = choice
        self.pool_size = pool_size
        self.entries = nn.Linear(pool_size * (features + 1), labels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps features to logits."""
        indices = self.choice.indices
        assert indices is not None
        shares = x.new_zeros(len(x), self.pool_size)
        shares.scatter_(1, indices, 1 / indices.shape[1])
        with_one = F.pad(x, (0, 1), value=1.0)  # for each entry's bias
        places = shares.unsqueeze(2) * with_one.unsqueeze(1)
        logits: torch.Tensor = self.entries(places.flatten(1))
        return logits
