"""Prefix tuning: trainable keys and values in front of every layer's own."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    check_positive,
    freeze,
    layers_from,
    linear_at,
    roles_of,
)
from fedpeft.peft._tokens import VirtualTokens

_Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Prefix(PeftMethod):
    """Every query of every layer also sees trainable keys and values.

    The prefix has no position: it lies before the text and is neither rotated nor
    hidden by a causal mask.

    Attributes:
        length: of the prefix, the same in every layer.
        first_layer: add it only in this layer and above.

    Source: Li and Liang (2021), Prefix-Tuning, section 4.2, without the
    reparametrisation of section 4.3: that is a larger network at the clients, and noise
    for all its weights. Starts from small normal values.
    """

    is_identity_at_start: ClassVar[bool] = False

    length: int = 8
    first_layer: int = 0

    def __post_init__(self) -> None:
        check_positive(length=self.length)
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Adds a prefix to the attention modules, which from now on read it.

        Raises:
            ValueError: for an unknown architecture or implementation of attention.
        """
        roles = roles_of(backbone, "choose lora")
        model: Any = backbone
        used = model.config._attn_implementation
        if used not in _NAMES:
            raise ValueError(
                f"Expected attention by {' or '.join(_NAMES)}, got {used}: load the "
                f"backbone with another attn_implementation."
            )
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        for _, layer in layers_from(backbone, roles, self.first_layer):
            key = linear_at(layer, roles.key)
            start = 0.02 * torch.randn(2, self.length, key.out_features)
            prefix = VirtualTokens(start.to(key.weight))
            layer.get_submodule(roles.attention).add_module("prefix", prefix)
            operations.append(prefix.operation)
        model.set_attn_implementation(_NAMES[used])
        return operations


_NAMES = {"eager": "prefix_eager", "sdpa": "prefix_sdpa"}
"""Attention that a backbone used -> ours around it, as transformers knows it."""


def _eager(
    module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Each architecture brings its own, under this name.
    own: _Attention = sys.modules[type(module).__module__].eager_attention_forward
    return _with_prefix(own, module, *args, **kwargs)


def _sdpa(
    module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _with_prefix(sdpa_attention_forward, module, *args, **kwargs)


def _sdpa_mask(**kwargs: Any) -> torch.Tensor | None:
    # Never the flag `is_causal` in place of a mask: it would hide the prefix.
    mask: torch.Tensor | None = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    return mask


def _with_prefix(
    attention: _Attention,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes attention with the module's prefix, if it has one.

    Shapes: query ``(batch, heads, tokens, size)``, key and value ``(batch, kv_heads,
    tokens, size)``, mask ``(batch, 1, tokens, tokens)``, added or boolean.
    """
    prefix = dict(module.named_children()).get("prefix")
    if prefix is None:  # a layer below first_layer
        return attention(module, query, key, value, mask, **kwargs)
    batch, heads, _, size = key.shape
    tokens = prefix(batch).unflatten(3, (heads, size)).transpose(2, 3)
    keys, values = tokens.unbind(1)
    key = torch.cat((keys.to(key.dtype), key), 2)
    value = torch.cat((values.to(value.dtype), value), 2)
    if mask is not None:
        visible = 1.0 if mask.dtype == torch.bool else 0.0
        mask = F.pad(mask, (keys.shape[2], 0), value=visible)
    return attention(module, query, key, value, mask, **kwargs)


AttentionInterface.register("prefix_eager", _eager)
AttentionInterface.register("prefix_sdpa", _sdpa)
AttentionMaskInterface.register("prefix_eager", eager_mask)
AttentionMaskInterface.register("prefix_sdpa", _sdpa_mask)
