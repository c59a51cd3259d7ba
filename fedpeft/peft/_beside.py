"""A chain of small linear layers beside a frozen one: what LoRA's relatives share."""

from collections import OrderedDict
from collections.abc import Iterator
from functools import reduce
from typing import cast

import torch
from peft import LoraConfig
from torch import nn

from fedpeft.interfaces import PeftAdapter
from fedpeft.peft._layers import (
    check_depth,
    default_targets,
    linear_at,
    names_ending,
)
from fedpeft.peft.library import library_adapter
from fedpeft.tensors import Tensors


class Beside(nn.Module):
    """``base(x) + scale * added(x)``: the identity while one of its weights is zero.

    Shapes: ``(batch, ..., in)`` -> ``(batch, ..., out)``.

    Args:
        base: the frozen layer.
        scale: of what is added.
        added: linear layers without bias, or layers that have a `weight` as well, by
            name and in the order in which they apply.
    """

    def __init__(self, base: nn.Linear, scale: float, **added: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.added = nn.Sequential(OrderedDict(added))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds the chain's output."""
        y: torch.Tensor = self.base(x)
        added: torch.Tensor = self.added(x)
        return y + self.scale * added

    @torch.no_grad()
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the chain as two matrices, ``(rank, in)`` and ``(out, rank)``."""
        down, *rest = (cast("torch.Tensor", layer.weight) for layer in self.added)
        return down, reduce(lambda product, weight: weight @ product, rest)


def targets(
    backbone: nn.Module,
    target_modules: tuple[str, ...] | None,
    first_layer: int,
    rank: int,
) -> list[tuple[str, nn.Linear]]:
    """Returns the linear layers to adapt, by name.

    Args:
        backbone: where they are.
        target_modules: ends of their names; None takes query and value.
        first_layer: take them from this layer and above.
        rank: of the product.

    Raises:
        ValueError: if there are none, or the rank is above what a layer can have.
    """
    check_depth(first_layer, backbone)
    ends = target_modules or default_targets(backbone)
    names = names_ending(backbone, first_layer, ends)
    layers = [(name, linear_at(backbone, name)) for name in names]
    for name, layer in layers:
        if rank > min(layer.in_features, layer.out_features):
            raise ValueError(
                f"Expected rank <= {min(layer.in_features, layer.out_features)}, the "
                f"size of {name} ({layer.out_features} x {layer.in_features}), got "
                f"{rank}: lower it, or choose larger target_modules."
            )
    return layers


def merge(backbone: nn.Module) -> None:
    """Adds every chain's product to its frozen layer, which returns to its place."""
    for name, module in _attached(backbone):
        down, up = module.factors()
        with torch.no_grad():
            module.base.weight.add_(up @ down, alpha=module.scale)
        backbone.set_submodule(name, module.base)


def as_lora(backbone: nn.Module) -> PeftAdapter:
    """Returns the chains as the `peft` library's LoRA, which computes the same.

    **Guarantees**: equal up to rounding.
    """
    tensors: Tensors = {}
    names, rank, scale = [], 1, 1.0
    for name, module in _attached(backbone):
        down, up = module.factors()
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        names.append(name)
        rank, scale = len(down), module.scale
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=names)
    return library_adapter(config, tensors)


def _attached(backbone: nn.Module) -> Iterator[tuple[str, Beside]]:
    for name, module in list(backbone.named_modules()):
        if isinstance(module, Beside):
            yield name, module
