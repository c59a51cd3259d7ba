"""Is a patch the only one whose token lies in the span? Shapes of vision transformers.

``b + q + 1 <= width``: b tokens, q pixels of a patch, and the token's scale. Tried with
random weights and, in place of updates, exact combinations of one image's tokens
in double precision, and the same rounded to single precision; without any prior. Then
nine real updates at the largest shape.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTModel

from fedpeft.attacks._image_scores import psnr
from fedpeft.attacks._images import blank_prior, model_inputs
from fedpeft.attacks._patches import Patches, find_patches
from fedpeft.attacks._span import rounding, span_of, stacked_rows
from fedpeft.attacks.span_image import closed_form
from fedpeft.data import fashion_mnist
from fedpeft.model import TaskModel
from fedpeft.peft import Lora
from fedpeft.tasks import ImageClassification, ImageClassifier
from fedpeft.tensors import Tensors

SHAPES = {
    "ViT-S/14, 28 pixels, colour": (384, 14, 28, 3),
    "ViT-S/14, 28 pixels, grey": (384, 14, 28, 1),
    "ViT-S/14, 182 pixels, grey": (384, 14, 182, 1),
    "ViT-S/14, 224 pixels, grey": (384, 14, 224, 1),
    "ViT-B/16, 224 pixels, colour": (768, 16, 224, 3),
    "ViT-L/16, 224 pixels, colour": (1024, 16, 224, 3),
    "ViT-L/14, 224 pixels, colour": (1024, 14, 224, 3),
}
_HALF = (0.5, 0.5, 0.5)
_READERS = ("q_proj", "k_proj", "v_proj")
_SMALL_LORA = Lora(rank=4)


def uniqueness() -> dict[str, Any]:
    """Returns, shape by shape, what the condition says and what came back."""
    found = {name: _tried(*shape) for name, shape in SHAPES.items()}
    return {**found, "ViT-L/14, 224 pixels, nine updates of LoRA": _from_updates()}


def _tried(width: int, patch: int, side: int, channels: int) -> dict[str, Any]:
    patches = find_patches(_model(width, patch, side), channels)
    assert isinstance(patches, Patches), patches
    image = _image(side, channels)
    tokens = patches.tokens(image.flatten(1))
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(2 * len(tokens), len(tokens), generator=rng).double()
    rows = mix @ tokens
    prior = blank_prior((channels, side, side))
    found = {}
    for precision, level in ((torch.float64, 1e-13), (torch.float32, 1e-7)):
        given = rows.to(precision).double()
        span = span_of(given / (level * given.square().mean().sqrt()))
        guess = closed_form(span, patches, prior, 1 / level)
        found[str(precision)] = round(psnr(guess.view_as(image), image).item(), 1)
    mean = prior.mean.view_as(image)
    return {
        "width": width,
        "tokens": len(tokens),
        "pixels_of_a_patch": channels * patch**2,
        "needed": len(tokens) + channels * patch**2 + 1,
        "is_unique": patches.is_unique(),
        "psnr": found,
        "psnr_of_grey": round(psnr(mean, image).item(), 1),
    }


def _from_updates(rounds: int = 9) -> dict[str, Any]:
    """Tries single-precision updates of rank 16 on query, key and value.

    What other clients do to B between the rounds is drawn.
    """
    model = _model(1024, 14, 224, Lora(rank=16, target_modules=_READERS))
    patches = find_patches(model, 3)
    assert isinstance(patches, Patches), patches
    image = _image(224, 3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        seen = [_round(model, image) for _ in range(rounds)]
    updates = [update for _, update in seen]
    noise = [rounding(state, update) for state, update in seen]
    span = span_of(stacked_rows(updates, noise, patches.readers))
    guess = closed_form(span, patches, blank_prior((3, 224, 224)), 1e6)
    return {
        "rows": 48 * rounds,
        "directions": span.rank(),
        "tokens": len(patches.places) + len(patches.fixed),
        "psnr": round(psnr(guess.view_as(image), image).item(), 1),
    }


def _round(model: TaskModel, image: torch.Tensor) -> tuple[Tensors, Tensors]:
    """Returns a state and one step of SGD from there."""
    trained = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_A" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert isinstance(model.task, ImageClassification)
    inputs = model_inputs(model.task, image.float())
    loss = F.cross_entropy(model.module(pixel_values=inputs), torch.tensor([3]))
    slopes = torch.autograd.grad(loss, list(trained.values()))
    state = {name: parameter.detach().clone() for name, parameter in trained.items()}
    pairs = zip(state.items(), slopes, strict=True)
    update = {n: (tensor - 0.05 * slope) - tensor for (n, tensor), slope in pairs}
    return state, update


def _model(width: int, patch: int, side: int, method: Lora = _SMALL_LORA) -> TaskModel:
    """One block is enough: what lies above does not change what the first one reads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=side,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
            intermediate_size=width,
        )
        backbone = ViTModel(config, add_pooling_layer=False)
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                if "position" in name:
                    parameter.normal_(0, 0.2)
                elif "patch_embeddings" in name and parameter.dim() > 1:
                    parameter.normal_(0, (3 * patch**2) ** -0.5)
                elif "layernorm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        operations = method.attach(backbone)
        module = ImageClassifier(backbone, width, 10)
    task = ImageClassification(side, _HALF, _HALF)
    return TaskModel(module, [*operations, *module.head_operations], task, "", {})


def _image(side: int, channels: int) -> torch.Tensor:
    """One garment a channel, ``(1, channels, side, side)`` in 0..1."""
    contents = fashion_mnist.load().contents[:channels]
    garments = torch.stack([torch.as_tensor(part) for part in contents])
    scaled: torch.Tensor = F.interpolate(
        garments[None].double() / 255, (side, side), mode="bilinear"
    )
    return scaled
