"""Full fine-tuning: what every other method is compared with."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fedpeft.interfaces import Operation, OperationKind, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    freeze,
    is_linear_or_norm,
    layer_of,
)


@dataclass(frozen=True)
class Full(PeftMethod):
    """Trains the linear and normalisation layers, weights and biases.

    Of all numbered layers, and of what lies above them, such as a final norm. The
    embeddings stay frozen: of a whole vocabulary's table every example would have a
    gradient of its own, most of it zeros (`token_rows` trains chosen rows of it). Under
    privacy one step takes memory for a gradient of the whole model an example.

    Attributes:
        first_layer: train only in this layer and above.
    """

    first_layer: int = 0

    def __post_init__(self) -> None:
        check_first_layer(self.first_layer)

    @property
    def starts_from_weights(self) -> bool:
        """Always: it trains the backbone's own values."""
        return True

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Makes the existing weights trainable: the identity by construction.

        Raises:
            ValueError: if there are no numbered layers.
        """
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        for module in _from_layer(backbone, self.first_layer):
            parameters = dict(module.named_parameters(recurse=False))
            if is_linear_or_norm(module) and parameters:
                module.requires_grad_(True)
                is_linear = isinstance(module, nn.Linear)
                kind: OperationKind = "linear" if is_linear else "norm"
                operations.append(Operation(module, kind, parameters))
        if not operations:
            raise ValueError(
                f"Expected a backbone of numbered layers, got "
                f"{type(backbone).__name__}: choose head."
            )
        return operations

    def merge(self, backbone: nn.Module) -> None:
        """Has nothing to do: what it trains is the backbone's own."""


def _from_layer(backbone: nn.Module, first_layer: int) -> Iterator[nn.Module]:
    """Yields the modules of a layer and above: modules stand in the order of use."""
    is_above = False
    for name, module in backbone.named_modules():
        depth = layer_of(name)
        is_above = is_above or depth is not None
        if is_above and (depth is None or depth >= first_layer):
            yield module
