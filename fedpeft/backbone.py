"""Frozen backbones by name, local path or hub id."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedpeft import assets
from fedpeft.errors import ConfigError
from fedpeft.tensors import fingerprint

_HUB = "hub:"


@dataclass(frozen=True)
class Backbone:
    """A pre-trained model without its head, and what it needs.

    Attributes:
        name: as it was asked for.
        module: maps ids and mask ``(batch, tokens)``, or pixels ``(batch, 3, height,
            width)``, to an output with ``last_hidden_state`` ``(batch, tokens,
            hidden)``.
        tokenizer: the `transformers` tokenizer that belongs to it; None for images.
        hidden_size: features of its output.
        fingerprint: sha256 over all its tensors, before any adapter.
        output: the layer over the vocabulary, of a causal language model alone.
        channels_mean: of the pixels it was trained on, in 0..1.
        channels_deviation: theirs.
    """

    name: str
    module: Any
    tokenizer: Any
    hidden_size: int
    fingerprint: str
    output: nn.Linear | None = None
    channels_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    channels_deviation: tuple[float, ...] = (0.229, 0.224, 0.225)


def load_backbone(name: str, task: str = "text-classification") -> Backbone:
    """Loads an asset, a local directory, or ``hub:org/model``.

    Weights are read from safetensors alone: no file is unpickled.

    Args:
        name: of the backbone.
        task: that it is for; ``causal-lm`` loads the output layer too.

    Raises:
        AssetError: if the asset is not pulled yet.
        ConfigError: if nothing of that name can be loaded.
    """
    source = _source(name)
    transformers_logging.disable_progress_bar()  # in a second's load it is noise
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries too
    local = not name.startswith(_HUB)
    is_causal = task == "causal-lm"
    kind = AutoModelForCausalLM if is_causal else AutoModel
    try:
        model = kind.from_pretrained(
            source,
            local_files_only=local,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=_attention(),
        )
        tokenizer = None
        if not hasattr(model.config, "patch_size"):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"[model] backbone: cannot load {name!r}: {reason}."
        ) from None
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused by any task, hence without a gradient
    model.requires_grad_(False)
    return Backbone(
        name,
        model.base_model if is_causal else model,
        tokenizer,
        model.config.hidden_size,
        fingerprint(model.state_dict().items()),
        model.get_output_embeddings() if is_causal else None,
        **_channels(source),
    )


def _channels(source: str) -> dict[str, tuple[float, ...]]:
    """Returns how an image model's pixels are normalised, where its folder says so."""
    path = Path(source) / "preprocessor_config.json"
    try:
        settings = json.loads(path.read_text())
        return {
            "channels_mean": tuple(settings["image_mean"]),
            "channels_deviation": tuple(settings["image_std"]),
        }
    except (OSError, ValueError, KeyError):
        return {}


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
