"""Frozen backbones by name, local path or hub id; the task's model around them."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedpeft import assets
from fedpeft.errors import ConfigError
from fedpeft.interfaces import Operation
from fedpeft.tensors import fingerprint

_HUB = "hub:"


@dataclass(frozen=True)
class Backbone:
    """A pre-trained encoder and what it needs.

    Attributes:
        module: maps ``(batch, tokens)`` ids and mask to ``(batch, tokens, hidden)``.
        tokenizer: the `transformers` tokenizer that belongs to it.
        hidden_size: features of its output.
        fingerprint: sha256 over all its tensors, before any adapter.
    """

    module: nn.Module
    tokenizer: Any
    hidden_size: int
    fingerprint: str


def load_backbone(name: str) -> Backbone:
    """Loads an asset, a local directory, or ``hub:org/model``.

    Weights are read from safetensors alone: no file is unpickled.

    Raises:
        AssetError: if the asset is not pulled yet.
        ConfigError: if nothing of that name can be loaded.
    """
    source = _source(name)
    transformers_logging.disable_progress_bar()  # in a second's load it is noise
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries too
    local = not name.startswith(_HUB)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        module = AutoModel.from_pretrained(
            source,
            local_files_only=local,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=_attention(),
        )
    except Exception as error:  # whatever a damaged file makes the libraries raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"[model] backbone: cannot load {name!r}: {reason}."
        ) from None
    if getattr(module, "pooler", None) is not None:
        module.pooler = None  # unused under mean pooling, hence without a gradient
    module.requires_grad_(False)
    return Backbone(
        module,
        tokenizer,
        module.config.hidden_size,
        fingerprint(module.state_dict().items()),
    )


def _attention() -> str:
    """Returns the faster one: on CPUs fused attention is slow backwards."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def _source(name: str) -> str:
    if name.startswith(_HUB):
        return name.removeprefix(_HUB)
    if name in assets.catalogue():
        return str(assets.locate(name))
    if Path(name).is_dir():
        return name
    raise ConfigError(
        f"[model] backbone: expected an asset ({', '.join(assets.catalogue())}), a "
        f"directory, or hub:org/model, got {name!r}."
    )


class TextClassifier(nn.Module):
    """Backbone, mean over the tokens that are not padding, linear head.

    The head is part of the model and always trainable. It starts at zero, so that all
    classes are equally likely at first whatever the backbone.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, num_labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Maps ids and mask ``(batch, tokens)`` to logits ``(batch, labels)``."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits: torch.Tensor = self.head(pooled)
        return logits

    @property
    def head_operation(self) -> Operation:
        """How the head's parameters act."""
        return Operation(self.head, "linear", dict(self.head.named_parameters()))
