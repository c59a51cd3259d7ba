"""Is this machine in order: versions, assets, gradients that are really per sample."""

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

from fedpeft import assets
from fedpeft.interfaces import Operation
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import METHODS, TokenRows
from fedpeft.privacy import DpSgd

_PACKAGES = ("torch", "transformers", "peft", "opacus", "dp-accounting", "flwr")
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Looks at everything; nothing is changed and nothing is fetched."""
    return [
        *(_package(name) for name in _PACKAGES),
        _machine(),
        *(_asset(asset) for asset in assets.catalogue().values()),
        *(gradients_of(name) for name in METHODS),
    ]


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, "not installed: run the README's install command")


def _machine() -> Finding:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    folder = assets.cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{os.cpu_count()} cores, {device}, {free / 1e9:.0f} GB free for assets"
    return Finding("machine", free > 1e9, detail)


def _asset(asset: assets.Asset) -> Finding:
    if assets.is_present(asset):
        return Finding(asset.name, True, "at hand")
    return Finding(asset.name, True, f"not at hand; `fedpeft assets pull {asset.name}`")


def gradients_of(method: str) -> Finding:
    """Compares the engine with the one-example loop on small models, layer by layer.

    On the machine's GPU if it has one, since another device runs other kernels.
    """
    what = f"gradients of {method}"
    done = []
    for family, build in _BACKBONES.items():
        if family == "vit" and METHODS[method] is TokenRows:
            continue  # an image has no tokens
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                broken = _first_broken(method, build())
        except Exception as error:  # whatever a changed library raises
            broken = str(error).splitlines()[0]
        if broken:
            return Finding(what, False, f"{family}: {broken}")
        done.append(family)
    return Finding(what, True, f"equal to the one-example loop ({', '.join(done)})")


def _first_broken(method: str, backbone: nn.Module) -> str:
    """Names the first parameter whose gradients differ, in the model's order."""
    options = {"token_ids": (1, 2, 3)} if METHODS[method] is TokenRows else {}
    operations = METHODS[method](**options).attach(backbone)
    model = _Classifier(backbone).to(_device()).eval()
    _randomise(model)
    plain = copy.deepcopy(model)
    engine = DpSgd(clipping_norm=1.0, noise_multiplier=0.0, nominal_batch=1)
    head = Operation(model.head, "linear", dict(model.head.named_parameters()))
    engine.bind(model, [*operations, head])
    rows = engine.per_sample_gradients(_losses(model))
    trainable = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    expected = loop_gradients(_losses(plain), list(trainable.values()))
    sizes = [parameter.numel() for parameter in trainable.values()]
    # What is nothing but rounding, such as a key's bias, is not held against it.
    floor = 0.1 * _TOLERANCE * expected.norm()
    parts = zip(
        torch.split(rows, sizes, 1), torch.split(expected, sizes, 1), strict=True
    )
    for name, (ours, theirs) in zip(trainable, parts, strict=True):
        error = relative_error(ours, theirs)
        if error > _TOLERANCE and (ours - theirs).norm() > floor:
            return f"{name} is off by {error:.1e} of the loop"
    return ""


class _Classifier(nn.Module):
    """Backbone, mean over all positions, linear head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(32, 3)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.backbone(**inputs).last_hidden_state
        logits: torch.Tensor = self.head(hidden.mean(1))
        return logits


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "attn_implementation": "sdpa" if torch.cuda.is_available() else "eager",
}
_BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(BertConfig(vocab_size=64, **_SIZES), False),
    "vit": lambda: ViTModel(ViTConfig(image_size=32, patch_size=8, **_SIZES), False),
    "llama": lambda: LlamaModel(
        LlamaConfig(vocab_size=64, num_key_value_heads=2, attention_bias=True, **_SIZES)
    ),
}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _randomise(model: nn.Module) -> None:
    """Leaves the identity, at which some gradients are zero and hide an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _losses(model: _Classifier) -> torch.Tensor:
    """One loss an example, of 3 images or of 3 texts of 7, 5 and 2 tokens."""
    rng = torch.Generator().manual_seed(1)
    if isinstance(model.backbone, ViTModel):
        inputs = {"pixel_values": torch.randn(3, 3, 32, 32, generator=rng)}
    else:
        mask = (torch.arange(7) < torch.tensor([[7], [5], [2]])).long()
        ids = torch.randint(0, 64, (3, 7), generator=rng)
        inputs = {"input_ids": ids, "attention_mask": mask}
    logits = model(**{name: tensor.to(_device()) for name, tensor in inputs.items()})
    labels = torch.tensor([0, 1, 2], device=logits.device)
    return F.cross_entropy(logits, labels, reduction="none")
