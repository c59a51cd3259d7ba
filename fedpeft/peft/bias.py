"""Bias-only fine-tuning."""

from dataclasses import dataclass

from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import check_depth, check_first_layer, freeze, modules_from


@dataclass(frozen=True)
class Bias(PeftMethod):
    """Trains the biases of all linear and normalisation layers.

    Attributes:
        first_layer: train only in this layer and above; 0 includes the embeddings'
            norm.

    Source: BitFit, Ben Zaken et al. (2022), section 3; under privacy: Bu et al. (2022),
    DP-BiTFiT.
    """

    first_layer: int = 0

    def __post_init__(self) -> None:
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Makes the existing biases trainable: the identity by construction."""
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        kinds = (nn.Linear, nn.LayerNorm)
        for _, module in modules_from(backbone, self.first_layer, kinds):
            if isinstance(bias := module.bias, nn.Parameter):
                bias.requires_grad_(True)
                operations.append(Operation(module, "bias", {"bias": bias}))
        return operations
