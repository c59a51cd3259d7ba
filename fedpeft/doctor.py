"""Is this machine in order: versions, assets, gradients that are really per sample."""

import copy
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from fedpeft import assets
from fedpeft.backbone import TextClassifier
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import METHODS
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
        *(_gradients(name) for name in METHODS),
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


def _gradients(method: str) -> Finding:
    """Compares the engine with the one-example loop on a small BERT, layer by layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _compare(method, f"per-sample gradients of {method}")


def _compare(method: str, what: str) -> Finding:
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    backbone = BertModel(config, add_pooling_layer=False)
    operations = METHODS[method]().attach(backbone)
    model = TextClassifier(backbone, 32, 3).eval()
    _randomise(model)
    plain = copy.deepcopy(model)
    engine = DpSgd(clipping_norm=1.0, noise_multiplier=0.0, nominal_batch=1)
    engine.bind(model, [*operations, model.head_operation])
    rows = engine.per_sample_gradients(_losses(model))
    trainable = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    expected = loop_gradients(_losses(plain), list(trainable.values()))
    sizes = [parameter.numel() for parameter in trainable.values()]
    parts = zip(
        torch.split(rows, sizes, 1), torch.split(expected, sizes, 1), strict=True
    )
    for name, (ours, theirs) in zip(trainable, parts, strict=True):
        error = relative_error(ours, theirs)
        if error > _TOLERANCE:
            return Finding(what, False, f"{name} is off by {error:.1e} of the loop")
    return Finding(what, True, f"equal to the one-example loop within {_TOLERANCE:g}")


def _randomise(model: torch.nn.Module) -> None:
    """Leaves the identity, at which some gradients are zero and hide an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _losses(model: TextClassifier) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (3, 7), generator=rng)
    mask = (torch.arange(7) < torch.tensor([[7], [5], [2]])).long()
    logits = model(ids, mask)
    return F.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="none")
