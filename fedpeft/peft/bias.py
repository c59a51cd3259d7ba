"""Bias-only fine-tuning."""

from dataclasses import dataclass

from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    freeze,
    is_linear_or_norm,
    modules_from,
)


@dataclass(frozen=True)
class Bias(PeftMethod):
    """Trains the biases of all linear and normalisation layers.

    Attributes:
        first_layer: train only in this layer and above; 0 includes what lies outside
            the layers, such as the embeddings' norm.

    Source: BitFit, Ben Zaken et al. (2022), section 3; under privacy: Bu et al. (2022),
    DP-BiTFiT.
    """

    first_layer: int = 0

    def __post_init__(self) -> None:
        check_first_layer(self.first_layer)

    @property
    def starts_from_weights(self) -> bool:
        """Always: it trains the backbone's own values."""
        return True

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Makes the existing biases trainable: the identity by construction.

        Raises:
            ValueError: if there is none, as in Llama.
        """
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        for _, module in modules_from(backbone, self.first_layer, is_linear_or_norm):
            bias = getattr(module, "bias", None)  # an RMSNorm has none
            if isinstance(bias, nn.Parameter):
                bias.requires_grad_(True)
                operations.append(Operation(module, "bias", {"bias": bias}))
        if not operations:
            raise ValueError(
                "Expected a backbone with biases, got one without: choose film or ssf."
            )
        return operations

    def merge(self, backbone: nn.Module) -> None:
        """Has nothing to do: what it trains is the backbone's own."""
