"""Prompt tuning, for texts and for images."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import (
    check_positive,
    freeze,
    layers_from,
    model_type,
    roles_of,
)
from fedpeft.peft._tokens import VirtualTokens

_IMAGE_TYPES = ("vit", "dinov2")
_PADDED_WITH = {"attention_mask": 1, "token_type_ids": 0}


@dataclass(frozen=True)
class Prompt(PeftMethod):
    """Puts virtual tokens before a text's embeddings, or behind an image's class token.

    The backbone's caller sees the shapes it saw before: the prompt's own positions are
    cut off the output. The prompt takes part in attention from the first layer on, and
    a text's own positions move up by its length.

    Attributes:
        length: the number of virtual tokens.
        deep: in front of every layer but the first, other virtual tokens take the place
            of what the layer below made of its own (VPT-deep).

    Source: Lester et al. (2021), The Power of Scale for Parameter-Efficient Prompt
    Tuning, section 2; the start from random rows of the embedding table is its "sampled
    vocabulary". For images: Jia et al. (2022), Visual Prompt Tuning, section 3.2,
    VPT-shallow and VPT-deep.
    """

    is_identity_at_start: ClassVar[bool] = False

    length: int = 16
    deep: bool = False

    def __post_init__(self) -> None:
        check_positive(length=self.length)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Adds the prompt as a child of the module that it changes, and the hooks.

        Raises:
            ValueError: for a backbone that is neither a ViT nor has a token embedding.
        """
        freeze(backbone)
        is_image_model = model_type(backbone) in _IMAGE_TYPES
        attach = _attach_to_image_model if is_image_model else _attach_to_text_model
        operations = [attach(backbone, self.length)]
        if self.deep:
            roles = roles_of(backbone, "set deep = false")
            for _, layer in layers_from(backbone, roles, first_layer=1):
                operation = _attach_to_layer(layer, self.length, int(is_image_model))
                operations.append(operation)
        return operations


# The hooks below are handed the module they hang on and take the prompt from it: a copy
# of the backbone then uses the copy's prompt.


def _attach_to_text_model(backbone: nn.Module, length: int) -> Operation:
    table = embedding_of(backbone)
    rows = torch.randint(table.num_embeddings, (length,))
    start = table.weight.detach()[rows.to(table.weight.device)].clone()
    backbone.prompt = prompt = VirtualTokens(start)
    backbone.register_forward_pre_hook(_prepend_to_text, with_kwargs=True)
    backbone.register_forward_hook(_cut_from_text)
    return prompt.operation


def _attach_to_layer(layer: nn.Module, length: int, at: int) -> Operation:
    like = next(layer.parameters())
    width = next(m for m in layer.modules() if isinstance(m, nn.Linear)).in_features
    start = 0.02 * torch.randn(length, width)
    layer.prompt = prompt = VirtualTokens(start.to(like))
    layer.register_forward_pre_hook(partial(_replace, at), with_kwargs=True)
    return prompt.operation


def _replace(
    at: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Puts the layer's own prompt where the prompt below came out."""
    hidden, *others = args
    prompt: torch.Tensor = layer.get_submodule("prompt")(hidden.shape[0])
    rest = hidden[:, at + prompt.shape[1] :]
    together = torch.cat((hidden[:, :at], prompt.to(hidden.dtype), rest), 1)
    return (together, *others), kwargs


def embedding_of(backbone: nn.Module) -> nn.Embedding:
    """Returns the table of the text's tokens.

    Raises:
        ValueError: if the backbone has none.
    """
    get_table = getattr(backbone, "get_input_embeddings", None)
    table = get_table() if get_table else None
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"Expected a backbone with a token embedding, got "
            f"{type(backbone).__name__}: choose a method that needs none."
        )
    return table


def _prepend_to_text(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
    refused = [
        n for n in ("past_key_values", "position_ids") if inputs.get(n) is not None
    ]
    if refused or len(args) > 2:
        raise ValueError(
            f"Expected ids and mask of whole texts behind a prompt, got "
            f"{', '.join(refused) or 'more arguments without a name'}."
        )
    ids, embedded = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    if embedded is None:
        embedded = embedding_of(backbone)(ids)
    prompt: torch.Tensor = backbone.get_submodule("prompt")(embedded.shape[0])
    length = prompt.shape[1]
    _check_room(backbone, length, embedded.shape[1])
    for name, value in _PADDED_WITH.items():
        if inputs.get(name) is not None:
            inputs[name] = F.pad(inputs[name], (length, 0), value=value)
    together = torch.cat((prompt.to(embedded.dtype), embedded), 1)
    return (), {**inputs, "inputs_embeds": together}


def _check_room(backbone: nn.Module, length: int, tokens: int) -> None:
    config = getattr(backbone, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length + tokens > positions:
        raise ValueError(
            f"Expected at most {positions - length} tokens behind a prompt of {length},"
            f" got {tokens}: set a smaller max_length."
        )


def _cut_from_text(backbone: nn.Module, args: Any, output: Any) -> Any:
    length = len(backbone.get_parameter("prompt.tokens"))
    output.last_hidden_state = output.last_hidden_state[:, length:]
    return output


def _attach_to_image_model(backbone: nn.Module, length: int) -> Operation:
    embeddings = backbone.get_submodule("embeddings")
    class_token = embeddings.get_parameter("cls_token")
    start = 0.02 * torch.randn(length, class_token.shape[-1])
    embeddings.prompt = prompt = VirtualTokens(start.to(class_token))
    embeddings.register_forward_hook(_insert_into_image)
    backbone.register_forward_hook(_cut_from_image)
    return prompt.operation


def _insert_into_image(
    embeddings: nn.Module, args: Any, output: torch.Tensor
) -> torch.Tensor:
    prompt: torch.Tensor = embeddings.get_submodule("prompt")(output.shape[0])
    parts = (output[:, :1], prompt.to(output.dtype), output[:, 1:])
    return torch.cat(parts, 1)


def _cut_from_image(backbone: nn.Module, args: Any, output: Any) -> Any:
    length = len(backbone.get_parameter("embeddings.prompt.tokens"))
    hidden = output.last_hidden_state
    output.last_hidden_state = torch.cat((hidden[:, :1], hidden[:, 1 + length :]), 1)
    return output
