"""Finding the part of a model that never changes while the rest trains."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpeft.interfaces import FrozenPart

_BEHIND = ("norm", "layernorm")
"""What stands behind the layers, by its name in the backbone."""


def find_frozen_part(backbone: nn.Module) -> FrozenPart | None:
    """Returns a method's own frozen part, or the layers below all that trains."""
    own = [module for module in backbone.modules() if isinstance(module, FrozenPart)]
    if own:
        return own[0]
    found = _layers(backbone)
    if found is None:
        return None
    path, layers = found
    depth = _lowest_trained(backbone, path, len(layers))
    return LowerLayers(path, depth) if depth else None


class _Reached(Exception):
    """Carries the hidden state that was looked for out of the backbone."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


@dataclass(frozen=True)
class LowerLayers(FrozenPart):
    """The layers below the first one in which something trains.

    Attributes:
        path: of the list of layers in the backbone.
        depth: how many of them; what is kept is the input of the next.
    """

    path: str
    depth: int

    def compute(
        self, backbone: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Runs the lower layers alone."""

        def leave(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            raise _Reached(output)

        last = self._layers(backbone)[self.depth - 1]
        handle = last.register_forward_hook(leave)
        try:
            backbone(**inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise AssertionError("a backbone calls its layers")

    def resume(
        self,
        backbone: nn.Module,
        inputs: dict[str, torch.Tensor],
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Runs the backbone with lower layers that only hand on."""
        with ExitStack() as stack:
            for layer in self._layers(backbone)[: self.depth]:
                stack.enter_context(_returning(layer, kept))
            hidden: torch.Tensor = backbone(**inputs).last_hidden_state
        return hidden

    def _layers(self, backbone: nn.Module) -> list[nn.Module]:
        return list(backbone.get_submodule(self.path).children())


@contextmanager
def _returning(layer: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    layer.forward = lambda *args, **kwargs: hidden
    try:
        yield
    finally:
        del layer.forward


def _layers(backbone: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Returns the backbone's list of layers and its path."""
    count = getattr(getattr(backbone, "config", None), "num_hidden_layers", None)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    return None


def _lowest_trained(backbone: nn.Module, path: str, num_layers: int) -> int:
    """Returns the depth of the first layer with something that trains, 0 to all."""
    lowest = num_layers
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad or name.split(".")[0] in _BEHIND:
            continue
        inside = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
        lowest = min(lowest, int(inside[1]) if inside else 0)
    return lowest
