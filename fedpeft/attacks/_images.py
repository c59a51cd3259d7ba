"""Images as an adversary thinks of them: unknown pixels, and what pixels are like."""

import functools
from dataclasses import dataclass
from functools import cached_property

import torch

from fedpeft.attacks.attack import Knowledge
from fedpeft.data import Encoded
from fedpeft.tasks import ImageClassification

_MOST_VALUES = 20_000_000
_MOST_EXAMPLES = 2_000


def pixels_of(encoded: Encoded) -> torch.Tensor:
    """Returns encoded images in 0..1, doubles ``(n, channels, height, width)``.

    >>> grey = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8)
    >>> pixels_of(Encoded([grey], torch.zeros(1))).tolist()
    [[[[0.0, 1.0], [0.2, 0.4]]]]
    """
    images = torch.stack(list(encoded.inputs)).double() / 255
    return images.unsqueeze(1) if images.dim() == 3 else images.movedim(3, 1)


def model_inputs(task: ImageClassification, images: torch.Tensor) -> torch.Tensor:
    """Returns pixels in 0..1 as the backbone takes them, differentiably.

    Shapes: ``(n, 1 or 3, height, width)`` -> ``(n, 3, height, width)``.
    """
    mean, deviation = (
        torch.tensor(values, dtype=images.dtype).view(3, 1, 1)
        for values in (task.mean, task.deviation)
    )
    colour: torch.Tensor = (images.expand(-1, 3, -1, -1) - mean) / deviation
    return colour


@dataclass(frozen=True, eq=False)
class ImagePrior:
    """What such images look like in general: a Gaussian over all their pixels.

    Attributes:
        shape: of an image: channels, height, width; one channel if all are grey.
        mean: shape ``(pixels,)``, in 0..1.
        axes: orthonormal rows, shape ``(k, pixels)``, along which images differ.
        deviations: by how much along each, shape ``(k,)``.
        rest: and along every other direction.
    """

    shape: tuple[int, int, int]
    mean: torch.Tensor
    axes: torch.Tensor
    deviations: torch.Tensor
    rest: float

    def image(self, white: torch.Tensor) -> torch.Tensor:
        """Returns the image of independent standard normals.

        Shapes: ``(n, pixels)`` -> ``(n, channels, height, width)``.
        """
        along = (white @ self.axes.t()) * (self.deviations - self.rest)
        flat: torch.Tensor = self.mean + self.rest * white + along @ self.axes
        return flat.view(-1, *self.shape)

    def white(self, images: torch.Tensor) -> torch.Tensor:
        """Returns what :meth:`image` makes these images of.

        Shapes: ``(n, channels, height, width)`` -> ``(n, pixels)``.
        """
        flat = images.flatten(1) - self.mean
        along = (flat @ self.axes.t()) * (1 / self.deviations - 1 / self.rest)
        whitened: torch.Tensor = flat / self.rest + along @ self.axes
        return whitened

    def covariance(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the covariance of some pixels, by their numbers, ``(p, p)``."""
        axes = self.axes[:, pixels]
        more = (self.deviations**2 - self.rest**2)[:, None] * axes
        return axes.t() @ more + self.rest**2 * torch.eye(len(pixels)).double()

    @cached_property
    def precision(self) -> torch.Tensor:
        """The inverse of the covariance of all pixels, ``(pixels, pixels)``."""
        less = (self.deviations**-2 - self.rest**-2)[:, None] * self.axes
        identity = torch.eye(self.axes.shape[1]).double()
        return self.axes.t() @ less + self.rest**-2 * identity


def blank_prior(shape: tuple[int, int, int]) -> ImagePrior:
    """Returns the prior of one who knows no such image: grey, give or take.

    >>> blank_prior((1, 2, 2)).image(torch.tensor([[0.0, 1, 0, 0]]).double())
    tensor([[[[0.5000, 0.8000],
              [0.5000, 0.5000]]]], dtype=torch.float64)
    """
    size = shape[0] * shape[1] * shape[2]
    empty = torch.zeros(0).double()
    mean = torch.full((size,), 0.5).double()
    return ImagePrior(shape, mean, empty.view(0, size), empty, 0.3)


@functools.lru_cache(maxsize=2)  # every victim's adversary has the same
def learned_prior(surrogate: Encoded, least_deviation: float = 0.02) -> ImagePrior:
    """Returns the prior that public images teach.

    The axes come from one half of them, the deviations from the other, so that they
    hold for images that were not among them.

    Args:
        surrogate: public images; a few hundred at least.
        least_deviation: along any direction, in 0..1.
    """
    sizes = [image.numel() for image in surrogate.inputs[:1]]
    most = min(_MOST_EXAMPLES, _MOST_VALUES // sizes[0], len(surrogate))
    images = pixels_of(surrogate.subset(range(most)))
    _, *shape = images.shape
    flat = images.flatten(1)
    mean = flat.mean(0)
    half = most // 2
    axes = torch.linalg.svd(flat[:half] - mean, full_matrices=False)[2]
    others = flat[half:] - mean
    along = others @ axes.t()
    left = others.square().sum() - along.square().sum()
    free = len(others) * max(1, flat.shape[1] - len(axes))
    rest = max(least_deviation, float(left.clamp(min=0) / free) ** 0.5)
    deviations = along.square().mean(0).sqrt().clamp(min=rest)
    return ImagePrior((shape[0], shape[1], shape[2]), mean, axes, deviations, rest)


def prior_of(knowledge: Knowledge) -> ImagePrior:
    """Returns what an adversary takes for granted; without public images, colour."""
    task, surrogate = knowledge.model.task, knowledge.surrogate
    if surrogate is not None and len(surrogate) > 1:
        return learned_prior(surrogate)
    assert isinstance(task, ImageClassification), "an attack says first if it fits"
    return blank_prior((3, task.image_size, task.image_size))
