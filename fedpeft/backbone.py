"""Frozen backbones by name, local path or hub id."""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from fedpeft import assets
from fedpeft.errors import ConfigError
from fedpeft.tensors import fingerprint

_HUB = "hub:"
_PREPROCESSOR = "preprocessor_config.json"


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
        fingerprint: sha256 over all its tensors, before any adapter; of an image model
            over how its pixels are normalised, too.
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
    transformers_logging.set_verbosity_error()  # what is missing is our own error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries too
    local = not name.startswith(_HUB)
    is_causal = task == "causal-lm"
    kind = AutoModelForCausalLM if is_causal else AutoModel
    try:
        model, report = kind.from_pretrained(
            source,
            local_files_only=local,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=_attention(),
            output_loading_info=True,
        )
        tokenizer = None
        is_image = hasattr(model.config, "patch_size")
        if not is_image:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"[model] backbone: cannot load {name!r}: {reason}."
        ) from None
    _check_whole(name, report["missing_keys"])
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused by any task, hence without a gradient
    model.requires_grad_(False)
    channels = _channels(source, local) if is_image else {}
    numbers = {key: torch.tensor(channels[key]).double() for key in channels}
    return Backbone(
        name,
        model.base_model if is_causal else model,
        tokenizer,
        model.config.hidden_size,
        fingerprint({**model.state_dict(), **numbers}.items()),
        model.get_output_embeddings() if is_causal else None,
        **channels,
    )


def _check_whole(name: str, missing: Iterable[str]) -> None:
    """Refuses weights that were drawn because the checkpoint has none; but a pooler's.

    Raises:
        ConfigError: names one.
    """
    drawn = sorted(key for key in missing if not key.startswith("pooler."))
    if drawn:
        raise ConfigError(
            f"[model] backbone: expected all weights for the task in {name!r}, got "
            f"none for {drawn[0]} and {len(drawn) - 1} others: choose a backbone that "
            "was trained for it."
        )


def _channels(source: str, local: bool) -> dict[str, tuple[float, ...]]:
    """Returns how an image model's pixels are normalised; as ImageNet's by default."""
    try:
        path = cached_file(source, _PREPROCESSOR, local_files_only=local)
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        mean, deviation = _three(settings["image_mean"]), _three(settings["image_std"])
        if min(deviation) <= 0:
            raise ValueError("a deviation is not above zero")
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        mean, deviation = Backbone.channels_mean, Backbone.channels_deviation
    return {"channels_mean": mean, "channels_deviation": deviation}


def _three(values: list[float]) -> tuple[float, ...]:
    red, green, blue = (float(value) for value in values)
    if not math.isfinite(red + green + blue):
        raise ValueError("a number is not finite")
    return red, green, blue


def _attention() -> str:
    """Returns the faster one: on CPUs fused attention is slow backwards."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def _source(name: str) -> str:
    if name.startswith(_HUB):
        source = name.removeprefix(_HUB)
        if Path(source).exists():  # transformers would read that instead
            raise ConfigError(
                f"[model] backbone: expected hub:org/model, got {name!r}, which is a "
                "file or folder here, too: start elsewhere, or give the folder's path."
            )
        return source
    if name in assets.catalogue():
        return str(assets.locate(name))
    if Path(name).is_dir():
        return name
    raise ConfigError(
        f"[model] backbone: expected an asset ({', '.join(assets.catalogue())}), a "
        f"directory, or hub:org/model, got {name!r}."
    )
