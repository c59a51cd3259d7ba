"""Passes through a frozen backbone: watching its layers, and leaving some of them out.

The methods that keep a part of what the backbone computes need these. What is not
trainable leaves no graph, so that such a pass keeps no activations either.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def stack_of(backbone: nn.Module) -> list[nn.Module]:
    """Returns the backbone's layers.

    Raises:
        ValueError: if it is no stack of as many layers as its configuration says.
    """
    count = getattr(getattr(backbone, "config", None), "num_hidden_layers", None)
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module.children())
    raise ValueError(
        f"Expected a backbone with a list of config.num_hidden_layers layers, got "
        f"{type(backbone).__name__}: choose another method."
    )


def hidden_size(backbone: nn.Module) -> int:
    """Returns the number of features of the backbone's output."""
    return int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]


def last_hidden(backbone: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Returns the backbone's own output, without the hooks that hang on it."""
    hidden: torch.Tensor = backbone.forward(**inputs).last_hidden_state
    return hidden


@contextmanager
def frozen_pass(backbone: nn.Module, device: str) -> Iterator[None]:
    """No graph, no dropout, single precision: the same whatever surrounds it."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def watched(layers: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Yields a list that gets each layer's output, in the order of the pass."""
    outputs: list[torch.Tensor] = []

    def note(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        outputs.append(output)

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def handing_on(layers: Sequence[nn.Module], hidden: torch.Tensor) -> Iterator[None]:
    """Makes layers hand on what is given in place of their output."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(delattr, layer, "forward")
            layer.forward = lambda *args, **kwargs: hidden
        yield
