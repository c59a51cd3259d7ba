"""Scaling a few activations of every layer."""

from dataclasses import dataclass

from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    freeze,
    layers_from,
    linear_at,
    roles_of,
)
from fedpeft.peft.ssf import ScaleShift


@dataclass(frozen=True)
class IA3(PeftMethod):
    """Scales keys, values and the feed-forward block's inner activations.

    Attributes:
        first_layer: scale only in this layer and above.

    Source: Liu et al. (2022), Few-Shot Parameter-Efficient Fine-Tuning is Better and
    Cheaper than In-Context Learning, section 3.3. All scales start at one.
    """

    first_layer: int = 0

    def __post_init__(self) -> None:
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts the scales behind key and value, and before the last linear layer.

        Raises:
            ValueError: for an unknown architecture.
        """
        roles = roles_of(backbone, "choose ssf, which scales every layer")
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        for _, layer in layers_from(backbone, roles, self.first_layer):
            for role in (roles.key, roles.value):
                linear = linear_at(layer, role)
                scale = ScaleShift(linear.out_features, shift=False)
                layer.set_submodule(role, nn.Sequential(linear, scale))
                operations.append(scale.operation)
            linear = linear_at(layer, roles.feed_forward_output)
            scale = ScaleShift(linear.in_features, shift=False)
            scaled = nn.Sequential(scale, linear)
            layer.set_submodule(roles.feed_forward_output, scaled)
            operations.append(scale.operation)
        return operations
