"""Finding the part of a model that never changes while the rest trains."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpeft.interfaces import FrozenPart
from fedpeft.passes import handing_on, stack_of

_BEHIND = ("norm", "layernorm")
"""What stands behind the layers, by its name in the backbone."""


def find_frozen_part(backbone: nn.Module) -> FrozenPart | None:
    """Returns a method's own frozen part, or the layers below all that trains."""
    for module in backbone.modules():
        if isinstance(module, FrozenPart):
            return module
    depth = _lowest_trained(backbone)
    return LowerLayers(depth) if depth else None


class _Reached(Exception):
    """Carries the hidden state that was looked for out of the backbone."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


@dataclass(frozen=True)
class LowerLayers(FrozenPart):
    """The layers below the first one in which something trains.

    Attributes:
        depth: how many of them; what is kept is the input of the next.
    """

    depth: int

    def compute(
        self, backbone: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Runs the lower layers alone."""

        def leave(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            raise _Reached(output)

        handle = stack_of(backbone)[self.depth - 1].register_forward_hook(leave)
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
        with handing_on(stack_of(backbone)[: self.depth], kept):
            hidden: torch.Tensor = backbone(**inputs).last_hidden_state
        return hidden


def _lowest_trained(backbone: nn.Module) -> int:
    """Returns the depth of the first layer with something that trains, 0 to all."""
    try:
        layers = stack_of(backbone)
    except ValueError:  # an architecture whose layers are not known
        return 0
    depths = {p: depth for depth, y in enumerate(layers) for p in y.parameters()}
    return min(
        (
            depths.get(parameter, 0)
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad and name.split(".")[0] not in _BEHIND
        ),
        default=len(layers),
    )
