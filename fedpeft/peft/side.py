"""Ladder side-tuning: a small network beside the backbone, and none through it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import FrozenPart, Operation, PeftMethod
from fedpeft.passes import hidden_size, last_hidden, stack_of
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    check_positive,
    freeze,
)
from fedpeft.peft.ssf import ScaleShift


class Rung(nn.Module):
    """Projects a layer's output to the side's width, and normalises it.

    The projection is frozen, orthonormal and random. The output is noted by its depth
    in a dictionary that all rungs of a backbone share; a copy of the backbone shares a
    copy of it.

    Shapes: ``(batch, tokens, features)`` -> ``(batch, tokens, width)``.
    """

    def __init__(
        self, features: int, width: int, depth: int, noted: dict[int, torch.Tensor]
    ) -> None:
        super().__init__()
        start = nn.init.orthogonal_(torch.empty(width, features))
        self.weight = nn.Parameter(start, requires_grad=False)
        self.depth = depth
        self.noted = noted

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Projects without a graph."""
        with torch.no_grad():
            step = F.linear(hidden, self.weight)
            step = F.layer_norm(step, step.shape[-1:])
        self.noted[self.depth] = step
        return step


class SideBlock(nn.Module):
    """A residual perceptron of one hidden layer, token by token: no attention.

    Shapes: ``(batch, tokens, width)`` -> the same.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Adds the perceptron's output."""
        added: torch.Tensor = self.narrow(F.gelu(self.widen(self.norm(state))))
        return state + added


class SideNetwork(nn.Module, FrozenPart):
    """Climbs the rungs: a block each, and at the top a way back to the backbone.

    Args:
        features: of the backbone.
        width: of the side.
        noted: what the rungs noted, by depth, the lowest first.
        num_rungs: their number.
    """

    def __init__(
        self, features: int, width: int, noted: dict[int, torch.Tensor], num_rungs: int
    ) -> None:
        super().__init__()
        self.noted = noted
        self.width = width
        self.blocks = nn.ModuleList(SideBlock(width) for _ in range(num_rungs))
        self.gates = nn.ModuleList(
            ScaleShift(width, shift=False) for _ in range(num_rungs - 1)
        )
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, steps: list[torch.Tensor]) -> torch.Tensor:
        """Maps each rung's ``(batch, tokens, width)`` to ``(batch, tokens, features)``.

        A gate, one factor a feature, mixes what comes from the rung below with a rung.
        """
        state = self.blocks[0](steps[0])
        for gate, block, step in zip(
            self.gates, self.blocks[1:], steps[1:], strict=True
        ):
            state = block(gate(state) + step)
        added: torch.Tensor = self.up(self.norm(state))
        return added

    def take_steps(self) -> list[torch.Tensor]:
        """Returns what was noted in the last pass, and forgets it."""
        steps = [self.noted[depth] for depth in sorted(self.noted)]
        self.noted.clear()
        return steps

    def compute(
        self, backbone: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Returns all rungs' steps and the last hidden state beside each other.

        Shape ``(batch, tokens, rungs * width + features)``.
        """
        with torch.no_grad():
            hidden = last_hidden(backbone, inputs)
        steps = [step.to(hidden.dtype) for step in self.take_steps()]
        return torch.cat((*steps, hidden), -1)

    def resume(
        self,
        backbone: nn.Module,
        inputs: dict[str, torch.Tensor],
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Adds the side's output; the backbone does not run."""
        sizes = [self.width] * len(self.blocks)
        sizes.append(kept.shape[-1] - sum(sizes))
        *steps, hidden = torch.split(kept, sizes, -1)
        added: torch.Tensor = self(steps)
        return hidden + added

    @property
    def operations(self) -> list[Operation]:
        """How its parameters act."""
        kinds: dict[type[nn.Module], Any] = {
            nn.Linear: "linear",
            nn.LayerNorm: "norm",
            ScaleShift: "scale_shift",
        }
        return [
            Operation(module, kinds[type(module)], dict(module.named_parameters()))
            for module in self.modules()
            if type(module) in kinds
        ]


# The hooks are handed the module they hang on and take rung and side from it: a copy of
# the backbone then uses the copy's.


def _note(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
    layer.get_submodule("rung")(output)


def _add_side(backbone: nn.Module, args: Any, output: Any) -> Any:
    side = backbone.get_submodule("side")
    assert isinstance(side, SideNetwork)
    hidden = output.last_hidden_state
    output.last_hidden_state = hidden + side(side.take_steps())
    return output


@dataclass(frozen=True)
class Side(PeftMethod):
    """A side network reads every layer's output and adds to the last one.

    Nothing is back-propagated through the backbone: in training it keeps no
    activations, and what the side reads of an example is computed once and kept. The
    side works token by token, without attention of its own; what tokens know of each
    other comes from the backbone.

    Attributes:
        reduction: the side is as many times narrower than the backbone.
        first_layer: the side reads the layers from this one on.

    Source: Sung et al. (2022), LST: Ladder Side-Tuning, arXiv:2206.06522, section 3.
    There the projections to the side's width train, and the blocks are whole
    transformer layers pruned from the backbone. Here the projections are frozen: what
    is kept is then as many times smaller, and what DP adds noise to has fewer values.
    """

    reduction: int = 8
    first_layer: int = 0

    def __post_init__(self) -> None:
        check_positive(reduction=self.reduction)
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts a rung on every layer and the side network beside them.

        Raises:
            ValueError: if the side would have no features.
        """
        features = hidden_size(backbone)
        width = features // self.reduction
        if width < 2:
            raise ValueError(
                f"Expected reduction <= {features // 2}, which leaves the side 2 of "
                f"{features} features, got {self.reduction}."
            )
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        noted: dict[int, torch.Tensor] = {}
        layers = stack_of(backbone)[self.first_layer :]
        for depth, layer in enumerate(layers):
            layer.rung = Rung(features, width, depth, noted)
            layer.register_forward_hook(_note)
        backbone.side = side = SideNetwork(features, width, noted, len(layers))
        backbone.register_forward_hook(_add_side)
        return side.operations
