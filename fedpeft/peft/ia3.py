"""Scaling a few activations of every layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import IA3Config
from torch import nn

from fedpeft.interfaces import Operation, PeftAdapter, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    freeze,
    layers_from,
    linear_at,
    roles_of,
)
from fedpeft.peft.library import library_adapter
from fedpeft.peft.ssf import ScaleShift, fold


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

    def merge(self, backbone: nn.Module) -> None:
        """Folds the scales into the rows and columns of the weights."""
        for name, linear, added, is_inner in list(_scaled(backbone)):
            if is_inner:
                with torch.no_grad():
                    linear.weight.mul_(added.scale.to(linear.weight.dtype))
            else:
                fold(linear, added)
            backbone.set_submodule(name, linear)

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns the library's IA3, which computes the same."""
        scaled = list(_scaled(backbone))
        tensors = {
            f"{name}.ia3_l": added.scale.unsqueeze(0 if is_inner else 1)
            for name, _, added, is_inner in scaled
        }
        config = IA3Config(
            target_modules=[name for name, *_ in scaled],
            feedforward_modules=[name for name, *_, is_inner in scaled if is_inner],
        )
        return library_adapter(config, tensors)


def _scaled(
    backbone: nn.Module,
) -> Iterator[tuple[str, nn.Linear, ScaleShift, bool]]:
    """Yields name, layer and scale, and whether the scale comes first."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Sequential) and len(module) == 2:
            first, second = module
            if isinstance(first, nn.Linear) and isinstance(second, ScaleShift):
                yield name, first, second, False
            if isinstance(first, ScaleShift) and isinstance(second, nn.Linear):
                yield name, second, first, True
