"""What the methods share: freezing, and finding modules by depth, kind or role."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn


@dataclass(frozen=True)
class Roles:
    """Where one architecture keeps what methods look for.

    Attributes:
        layers: path of the list of layers. All other paths start at one layer.
        attention: the module that computes attention from query, key and value.
        query: linear layer.
        key: linear layer.
        value: linear layer.
        attention_output: the linear layer that ends the attention block.
        feed_forward_output: the linear layer that ends the feed-forward block.
        is_causal: whether a token sees only those before it.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    attention_output: str
    feed_forward_output: str
    is_causal: bool = False


_BERT = Roles(
    "encoder.layer",
    "attention.self",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "output.dense",
)
_DISTILBERT = Roles(
    "transformer.layer",
    "attention",
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "ffn.lin2",
)
_VIT = Roles(
    "layers",
    "attention",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "mlp.fc2",
)
_DINOV2 = Roles(
    "encoder.layer",
    "attention",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "mlp.fc2",
)
_LLAMA = Roles(
    "layers",
    "self_attn",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
    is_causal=True,
)
ROLES: dict[str, Roles] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "vit": _VIT,
    "dinov2": _DINOV2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
"""By the `model_type` of a backbone's configuration."""


_LARGEST = 65_536
"""Size of a rank, a width, a length, a pool: far above any that helps."""


def model_type(backbone: nn.Module) -> str:
    """Returns the architecture's name, empty if the backbone does not tell."""
    return str(getattr(getattr(backbone, "config", None), "model_type", ""))


def roles_of(backbone: nn.Module, otherwise: str) -> Roles:
    """Returns where the backbone keeps what.

    Raises:
        ValueError: for an unknown architecture; `otherwise` says what to do instead.
    """
    name = model_type(backbone)
    if name not in ROLES:
        raise ValueError(
            f"Expected a backbone of type {', '.join(ROLES)}, got "
            f"{name or type(backbone).__name__!r}: {otherwise}."
        )
    return ROLES[name]


def layers_from(
    backbone: nn.Module, roles: Roles, first_layer: int
) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and module of the layers ``first_layer`` and above."""
    for depth, layer in enumerate(backbone.get_submodule(roles.layers).children()):
        if depth >= first_layer:
            yield f"{roles.layers}.{depth}", layer


def linear_at(layer: nn.Module, path: str) -> nn.Linear:
    """Returns the linear layer of a role.

    Raises:
        ValueError: if something else is there, such as another method's module.
    """
    linear = layer.get_submodule(path)
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"Expected a linear layer at {path}, got {type(linear).__name__}: attach "
            f"to a plain backbone."
        )
    return linear


def default_targets(backbone: nn.Module) -> tuple[str, ...]:
    """Returns the ends of the names of query and value.

    For an architecture that only the `peft` library knows, its choice for LoRA.

    Raises:
        ValueError: for an architecture that is unknown there, too.
    """
    kind = model_type(backbone)
    if kind not in ROLES:
        theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if isinstance(theirs, list):
            return tuple(theirs)
    roles = roles_of(backbone, "set target_modules")
    return roles.query, roles.value


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
    backbone: nn.Module, first_layer: int, is_wanted: Callable[[nn.Module], bool]
) -> list[tuple[str, nn.Module]]:
    """Returns the wanted modules of layers ``first_layer`` and above, by name.

    What lies outside the numbered layers (embeddings, a final norm) belongs to layer 0:
    it is among them only if ``first_layer`` is 0.
    """
    return [
        (name, module)
        for name, module in backbone.named_modules()
        if is_wanted(module) and (layer_of(name) or 0) >= first_layer
    ]


def names_ending(
    backbone: nn.Module, first_layer: int, ends: tuple[str, ...]
) -> list[str]:
    """Returns the whole names of modules by the ends of their names.

    Raises:
        ValueError: if no name of layers ``first_layer`` and above ends so.
    """
    names = [
        name
        for name, _ in backbone.named_modules()
        if any(f".{name}".endswith(f".{end}") for end in ends)
        and (layer_of(name) or 0) >= first_layer
    ]
    if not names:
        raise ValueError(
            f"Expected target_modules that end the name of a layer, got "
            f"{', '.join(ends)}: there is none such; the linear ones end in "
            f"{', '.join(_ends_of_linear(backbone, ends[0]))}."
        )
    return names


def _ends_of_linear(backbone: nn.Module, wanted: str) -> list[str]:
    """Returns the last parts of the linear layers' names, the nearest first."""
    linear = [
        n for n, module in backbone.named_modules() if isinstance(module, nn.Linear)
    ]
    ends = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    likeness = SequenceMatcher(b=wanted.rpartition(".")[2])

    def unlikeness(end: str) -> float:
        likeness.set_seq1(end)
        return -likeness.ratio()

    return sorted(ends, key=unlikeness)


def is_norm(module: nn.Module) -> bool:
    """Tells whether it is a LayerNorm or an RMSNorm, of torch or of transformers."""
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return known or type(module).__name__.endswith("RMSNorm")


def is_linear_or_norm(module: nn.Module) -> bool:
    """Tells whether it is one of the layers that take most methods' parameters."""
    return isinstance(module, nn.Linear) or is_norm(module)


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


def check_positive(**values: int) -> None:
    """Refuses a size below one, or one that no method needs.

    A client builds what a plan of others asks for: one number must not fill its memory.

    >>> check_positive(rank=0)
    Traceback (most recent call last):
    ValueError: Expected rank >= 1, got 0.
    >>> check_positive(length=10**9)
    Traceback (most recent call last):
    ValueError: Expected length <= 65536, got 1000000000.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"Expected {name} >= 1, got {value}.")
        if value > _LARGEST:
            raise ValueError(f"Expected {name} <= {_LARGEST}, got {value}.")


def check_above_zero(**values: float | None) -> None:
    """Refuses a scale that is not positive; None stands for a default.

    >>> check_above_zero(scale=0.0)
    Traceback (most recent call last):
    ValueError: Expected scale > 0, got 0.0.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"Expected {name} > 0, got {value}.")
