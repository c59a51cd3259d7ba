"""What the methods share: freezing, and finding modules by depth."""

import re
from collections.abc import Iterator

from torch import nn


def freeze(backbone: nn.Module) -> None:
    """Stops every parameter from training."""
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)


def layer_of(name: str) -> int | None:
    """Returns the depth in a module's name, None for what lies outside the layers.

    >>> layer_of("encoder.layer.3.attention.self.query")
    3
    """
    match = re.search(r"\.(\d+)(\.|$)", name)
    return int(match[1]) if match else None


def modules_from(
    backbone: nn.Module, first_layer: int, kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of some kinds in layers ``first_layer`` and above.

    What lies outside the numbered layers (embeddings, a final norm) belongs to layer 0:
    it is yielded only if ``first_layer`` is 0.
    """
    for name, module in backbone.named_modules():
        if isinstance(module, kinds) and (layer_of(name) or 0) >= first_layer:
            yield name, module


def check_first_layer(first_layer: int) -> None:
    """Refuses a negative depth."""
    if first_layer < 0:
        raise ValueError(f"Expected first_layer >= 0, got {first_layer}.")


def check_depth(first_layer: int, backbone: nn.Module) -> None:
    """Refuses a depth that the backbone has not.

    Raises:
        ValueError: nothing of the backbone would train.
    """
    depths = [layer_of(name) or 0 for name, _ in backbone.named_modules()]
    if first_layer > max(depths):
        raise ValueError(
            f"Expected first_layer <= {max(depths)}, the deepest layer, got "
            f"{first_layer}."
        )
