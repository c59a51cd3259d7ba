"""Scaling and shifting the features of a frozen backbone."""

from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import check_depth, check_first_layer, freeze, modules_from


class ScaleShift(nn.Module):
    """A frozen layer followed by ``scale * y + shift``, one pair a feature.

    Shapes: the layer's output ``(batch, ..., features)`` -> the same.
    """

    def __init__(self, base: nn.Module, features: int) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer, then the scale and shift in the output's dtype."""
        y = self.base(x)
        return torch.addcmul(self.shift.to(y.dtype), y, self.scale.to(y.dtype))


@dataclass(frozen=True)
class SSF(PeftMethod):
    """One scale and one shift behind every linear and normalisation layer.

    Attributes:
        first_layer: add them only in this layer and above; 0 includes the embeddings'
            norm.

    Source: Lian et al. (2022), Scaling & Shifting Your Features, section 3.2. There
    both start from small random values; here from exactly one and zero, so that the
    backbone is unchanged until it learns something.
    """

    first_layer: int = 0

    def __post_init__(self) -> None:
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Wraps the layers in place."""
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        kinds = (nn.Linear, nn.LayerNorm)
        operations = []
        for name, module in list(modules_from(backbone, self.first_layer, kinds)):
            wrapped = ScaleShift(module, _features(module))
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, wrapped)
            parameters = {"scale": wrapped.scale, "shift": wrapped.shift}
            operations.append(Operation(wrapped, "scale_shift", parameters))
        return operations


def _features(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    raise TypeError(f"Expected a linear or norm layer, got {type(module).__name__}.")
