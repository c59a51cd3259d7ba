"""Bottleneck adapters."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    check_positive,
    freeze,
    layers_from,
    linear_at,
    names_ending,
    roles_of,
)


class Adapter(nn.Module):
    """``y + up(gelu(down(y)))``: the identity until it is trained, since up is zero.

    Shapes: ``(batch, ..., features)`` -> the same; ``width`` inside.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Adds the bottleneck's output."""
        added: torch.Tensor = self.up(F.gelu(self.down(y)))
        return y + added

    @property
    def operations(self) -> list[Operation]:
        """How its parameters act."""
        return [
            Operation(linear, "linear", dict(linear.named_parameters()))
            for linear in (self.down, self.up)
        ]


@dataclass(frozen=True)
class Bottleneck(PeftMethod):
    """An adapter behind the feed-forward block of each layer, before the residual sum.

    Attributes:
        width: features inside the adapter.
        placement: ``ffn``, or ``both`` for one behind the attention block as well.
        target_modules: ends of the names of the linear layers that get an adapter
            behind them, for an architecture that is not known here; it replaces
            `placement`.
        first_layer: add them only in this layer and above.

    Source: Pfeiffer et al. (2021), AdapterFusion (``ffn``); Houlsby et al. (2019),
    section 2.1 (``both``).
    """

    width: int = 16
    placement: Literal["ffn", "both"] = "ffn"
    target_modules: tuple[str, ...] | None = None
    first_layer: int = 0

    def __post_init__(self) -> None:
        check_positive(width=self.width)
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts the adapters behind the linear layers that end the blocks.

        Raises:
            ValueError: for an unknown architecture, or if no layer matches.
        """
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        for name in self._targets(backbone):
            linear = linear_at(backbone, name)
            adapter = Adapter(linear.out_features, self.width)
            backbone.set_submodule(name, nn.Sequential(linear, adapter))
            operations += adapter.operations
        return operations

    def _targets(self, backbone: nn.Module) -> list[str]:
        if self.target_modules:
            return names_ending(backbone, self.first_layer, self.target_modules)
        roles = roles_of(backbone, "set target_modules")
        ends = [roles.feed_forward_output]
        if self.placement == "both":
            ends.insert(0, roles.attention_output)
        layers = layers_from(backbone, roles, self.first_layer)
        return [f"{path}.{end}" for path, _ in layers for end in ends]
