"""Scaling and shifting the features of a frozen backbone."""

from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    freeze,
    is_linear_or_norm,
    modules_from,
)


class ScaleShift(nn.Module):
    """``scale * y + shift``, one pair a feature: the identity until it is trained.

    Shapes: ``(batch, ..., features)`` -> the same.

    Args:
        features: size of the last dimension.
        shift: False for a scale alone.
    """

    def __init__(self, features: int, shift: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.shift = nn.Parameter(torch.zeros(features)) if shift else None

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Scales and shifts in the dtype of `y`."""
        scale = self.scale.to(y.dtype)
        if self.shift is None:
            return y * scale
        return torch.addcmul(self.shift.to(y.dtype), y, scale)

    @property
    def operation(self) -> Operation:
        """How its parameters act."""
        return Operation(self, "scale_shift", dict(self.named_parameters()))


@dataclass(frozen=True)
class SSF(PeftMethod):
    """One scale and one shift behind every linear and normalisation layer.

    Attributes:
        first_layer: add them only in this layer and above; 0 includes what lies outside
            the layers, such as the embeddings' norm.

    Source: Lian et al. (2022), Scaling & Shifting Your Features, section 3.2. There
    both start from small random values; here from exactly one and zero, so that the
    backbone is unchanged until it learns something.
    """

    first_layer: int = 0

    def __post_init__(self) -> None:
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts them behind the layers, in place."""
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        for name, module in modules_from(backbone, self.first_layer, is_linear_or_norm):
            added = ScaleShift(features_of(module))
            backbone.set_submodule(name, nn.Sequential(module, added))
            operations.append(added.operation)
        return operations

    def merge(self, backbone: nn.Module) -> None:
        """Folds scales and shifts into the weights and biases before them.

        Raises:
            ValueError: if a layer has no bias to take its shift; nothing is changed.
        """
        pairs = [
            (name, *module)
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Sequential) and isinstance(module[-1], ScaleShift)
        ]
        for name, layer, _ in pairs:
            if getattr(layer, "bias", None) is None:
                raise ValueError(
                    f"Expected layers with a bias to take the shifts, got {name} "
                    f"({type(layer).__name__}) without one: export the tensors."
                )
        for name, layer, added in pairs:
            fold(layer, added)
            backbone.set_submodule(name, layer)


@torch.no_grad()
def fold(layer: nn.Module, added: ScaleShift) -> None:
    """Folds what comes behind a layer into its own parameters."""
    parameters = dict(layer.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        scale = added.scale.to(parameter.dtype)
        parameter.mul_(scale.unsqueeze(1) if parameter.dim() == 2 else scale)
        if name == "bias" and added.shift is not None:
            parameter.add_(added.shift.to(parameter.dtype))


def features_of(module: nn.Module) -> int:
    """Returns the size of the last dimension of what a layer gives."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[-1]
    return sum(gain.numel() for gain in module.parameters())  # one vector
