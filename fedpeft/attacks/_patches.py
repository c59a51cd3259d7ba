"""From pixels to the first trained block's input: a map that everybody knows.

A vision transformer multiplies every patch by one matrix, adds a bias and a position,
and normalises. Up to the normalisation it is affine in the pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.attacks._images import model_inputs
from fedpeft.attacks._span import Reader, find_readers, first_input
from fedpeft.model import TaskModel
from fedpeft.tasks import ImageClassification


@dataclass(frozen=True, eq=False)
class Patches:
    """How tokens follow from the pixels of patches; everything in doubles.

    Attributes:
        places: the numbers of each patch's pixels within the image ``(channels, height,
            width)``, flattened, shape ``(patches, q)``.
        weight: of a patch's pixels in 0..1, shape ``(width, q)``.
        offsets: each patch's token where all pixels are 0, ``(patches, width)``.
        fixed: tokens of no patch, such as the class token, ``(fixed, width)``.
        gain: of the normalisation, shape ``(width,)``.
        shift: likewise.
        eps: likewise.
        readers: names of the trained matrices that read the result.
    """

    places: torch.Tensor
    weight: torch.Tensor
    offsets: torch.Tensor
    fixed: torch.Tensor
    gain: torch.Tensor
    shift: torch.Tensor
    eps: float
    readers: tuple[str, ...]

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.weight.shape[0]

    def is_unique(self) -> bool:
        """Whether one image's tokens within their own span fix its pixels.

        A span of b dimensions leaves ``width - b`` equations for the q pixels of a
        patch and the unknown scale of its token. With several images a combination of
        theirs is as good as each.
        """
        spanned = len(self.places) + len(self.fixed)
        return spanned + self.weight.shape[1] + 1 <= self.width

    def embedded(self, images: torch.Tensor) -> torch.Tensor:
        """Returns patches before the normalisation.

        Shapes: ``(n, pixels)`` -> ``(n * patches, width)``.
        """
        tokens = images[:, self.places] @ self.weight.t() + self.offsets
        return tokens.flatten(0, 1)

    def normalised(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns what the readers are given for tokens, ``(n, width)``."""
        size = (self.width,)
        return F.layer_norm(tokens, size, self.gain, self.shift, self.eps)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Returns all inputs that these images give rise to, the fixed ones first.

        Shapes: ``(n, pixels)`` -> ``(fixed + n * patches, width)``.
        """
        return self.normalised(torch.cat([self.fixed, self.embedded(images)]))


def find_patches(model: TaskModel, channels: int) -> Patches | str:
    """Returns the map of a model, or half a sentence that says why it has none.

    What is found is tried on an image: a backbone of another kind is noticed.

    Args:
        model: in any trainable state.
        channels: of the unknown image: 3, or 1 for a grey one.
    """
    task = model.task
    if not isinstance(task, ImageClassification):
        return "its records are no images"
    trial = _trial(task, channels)
    model.module.eval()
    inputs = {"pixel_values": model_inputs(task, trial).to(model.device)}
    readers = find_readers(model.module, model.operations, inputs)
    if not readers:
        return "no trained matrix reads the first block's input"
    patches = _read(model, task, readers, channels)
    if patches is not None:
        expected = _given(model, task, readers[0], trial)
        found = patches.tokens(trial.double().flatten(1))
        if expected.shape == found.shape and _are_close(found, expected):
            return patches
    return "what the first trained block reads is not a normalised patch each"


def _trial(task: ImageClassification, channels: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    size = task.image_size
    return torch.rand(1, channels, size, size, generator=rng)


def _are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-4 * expected.norm())


def _given(
    model: TaskModel, task: ImageClassification, reader: Reader, image: torch.Tensor
) -> torch.Tensor:
    inputs = {"pixel_values": model_inputs(task, image).to(model.device)}
    return first_input(model.module, reader, inputs)[0].cpu().double()


def _read(
    model: TaskModel, task: ImageClassification, readers: list[Reader], channels: int
) -> Patches | None:
    """Takes the model's own matrices; None where they are not what they should be."""
    black = torch.zeros(1, channels, task.image_size, task.image_size)
    calls: list[tuple[nn.LayerNorm, torch.Tensor]] = []

    def note(norm: nn.Module, args: Any, output: torch.Tensor) -> None:
        assert isinstance(norm, nn.LayerNorm)
        calls.append((norm, args[0][0].detach().cpu().double()))

    parts = [*model.module.modules()]
    norms = [part for part in parts if isinstance(part, nn.LayerNorm)]
    handles = [norm.register_forward_hook(note) for norm in norms]
    try:
        _given(model, task, readers[0], black)  # whose pass ends at the reader
    finally:
        for handle in handles:
            handle.remove()
    kernel = next((part for part in parts if isinstance(part, nn.Conv2d)), None)
    if kernel is None or not calls:
        return None
    norm, tokens = calls[-1]
    places = _places(black.shape[1:], kernel.kernel_size[0])
    if len(tokens) < len(places) or not norm.elementwise_affine:
        return None
    fixed = len(tokens) - len(places)
    return Patches(
        places,
        _weight(kernel, task, channels),
        tokens[fixed:],
        tokens[:fixed],
        norm.weight.detach().cpu().double(),
        norm.bias.detach().cpu().double(),
        norm.eps,
        tuple(reader.name for reader in readers),
    )


def _places(shape: torch.Size, side: int) -> torch.Tensor:
    numbers = torch.arange(shape.numel()).double().view(1, *shape)
    return F.unfold(numbers, side, stride=side)[0].t().long()


def _weight(
    kernel: nn.Conv2d, task: ImageClassification, channels: int
) -> torch.Tensor:
    """Returns the kernel as a matrix on pixels in 0..1 before their normalisation."""
    deviation = torch.tensor(task.deviation).double().view(1, 3, 1, 1)
    weight = kernel.weight.detach().cpu().double() / deviation
    if channels == 1:
        weight = weight.sum(1, keepdim=True)
    return weight.flatten(1)
