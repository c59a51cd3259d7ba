"""Feature-wise linear modulation by the norms that a backbone has already."""

from dataclasses import dataclass

from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    freeze,
    is_norm,
    modules_from,
)


@dataclass(frozen=True)
class Film(PeftMethod):
    """Trains gain and bias of every LayerNorm, the gain of every RMSNorm.

    Attributes:
        first_layer: train only in this layer and above; 0 includes the norms outside
            the layers: behind the embeddings, and the final one.

    Source: Tobaben et al. (2023), On the Efficacy of Differentially Private Few-shot
    Image Classification; the idea is Perez et al. (2018), FiLM.
    """

    first_layer: int = 0

    def __post_init__(self) -> None:
        check_first_layer(self.first_layer)

    @property
    def starts_from_weights(self) -> bool:
        """Always: it trains the backbone's own values."""
        return True

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Makes the existing gains and biases trainable: the identity by construction.

        Raises:
            ValueError: if there is none.
        """
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        for _, module in modules_from(backbone, self.first_layer, is_norm):
            parameters = dict(module.named_parameters(recurse=False))
            if parameters:
                module.requires_grad_(True)
                operations.append(Operation(module, "norm", parameters))
        if not operations:
            raise ValueError(
                "Expected a backbone with trainable norms, got one without: choose ssf "
                "or lora."
            )
        return operations

    def merge(self, backbone: nn.Module) -> None:
        """Has nothing to do: what it trains is the backbone's own."""
