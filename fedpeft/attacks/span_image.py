"""Reads a client's image out of what adapters of the first block learned.

The tokens that these read are a public function of the image, and their updates' rows
lie in the tokens' span (see ``_span``). For a patch with pixels u, the token is
``gain * C (W u + c) / s + shift``, C the centring: that it lies in the span is linear
in ``u / s`` and ``1 / s``. If the span's b dimensions, the patch's q pixels and the
scale are no more than the width, ``b + q + 1 <= width``, one solution is left.

Noise enters through the rows: rounding, since the update is a difference of numbers in
single precision; compression; or privacy. So the linear solution is only the start, and
the end is the image that is most likely given the rows and what such images look like
(see ``_likely_images``). Where nothing stands out of the noise, that is the mean image.

The derivation is ours. That patches follow from the inputs of a transformer's first
layer: Lu et al. (2022), APRIL, section 3, for trained positions and no normalisation.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedpeft.attacks._image_scores import ImageAttack
from fedpeft.attacks._images import ImagePrior, prior_of
from fedpeft.attacks._likely_images import LikelyImages
from fedpeft.attacks._patches import Patches, find_patches
from fedpeft.attacks._signal import signal_rows
from fedpeft.attacks._span import Span, span_of
from fedpeft.attacks.attack import Knowledge, Observation
from fedpeft.attacks.threats import ThreatModel
from fedpeft.tasks import ImageClassification


@dataclass(frozen=True)
class SpanImage(ImageAttack):
    """Closed form, then the most likely image; a guess is ``(n, channels, h, w)``.

    **Not guaranteed**: that several images are told apart. Any combination of their
    tokens is in the span too; only the prior speaks for the images themselves.

    Attributes:
        num_images: how many a client is believed to have trained on.
        trusts: the observation's weights against the prior's in the closed form, one
            solution each; the one to which the rows are nearest is taken.
        paths: of the search that follows; each is a row of factors on what is believed
            of the rows, and ends with 1. What is seen through more noise has fewer
            maxima.
        iterations: of each search; 0 leaves the closed form.
        most_unknown: pixels up to which there is a search.
    """

    num_images: int = 1
    trusts: tuple[float, ...] = (1.0, 1e1, 1e2, 1e3, 1e4, 1e6, 1e8)
    paths: tuple[tuple[float, ...], ...] = ((1.0,), (0.01, 0.1, 1.0))
    iterations: int = 40
    most_unknown: int = 4000

    needs: ClassVar[ThreatModel] = ThreatModel("B", "aggregate", "reconstruct")

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Wants images, and a trained matrix right behind their patches."""
        if not isinstance(knowledge.model.task, ImageClassification):
            return "its records are no images"
        found = find_patches(knowledge.model, prior_of(knowledge).shape[0])
        return found if isinstance(found, str) else None

    def run(self, observation: Observation, rng: torch.Generator) -> torch.Tensor:
        """Returns the most likely images, in 0..1."""
        prior = prior_of(observation.knowledge)
        patches = find_patches(observation.knowledge.model, prior.shape[0])
        assert isinstance(patches, Patches), patches
        tokens = self.num_images * len(patches.places) + len(patches.fixed)
        rows = signal_rows(observation, patches.readers, tokens)
        images = prior.mean.expand(self.num_images, -1)
        if len(rows) > 0:
            images = self._search(LikelyImages(rows, patches, prior), images, rng)
        return images.clamp(0, 1).view(-1, *prior.shape)

    def _search(
        self, likelihood: LikelyImages, mean: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Returns the best of what the closed form gives, and what is near it."""
        patches, prior = likelihood.patches, likelihood.prior
        span = span_of(likelihood.rows)
        solved = [closed_form(span, patches, prior, trust) for trust in self.trusts]
        starts = [mean, *(image.expand_as(mean) for image in solved)]
        if len(mean) > 1:  # equal images have no derivative that parts them
            noise = torch.randn(mean.shape, generator=rng, dtype=mean.dtype)
            apart = prior.image(noise).flatten(1) - prior.mean
            starts = [(start + apart / 2).clamp(0, 1) for start in starts]
        start = min(starts, key=likelihood.distance)
        if mean.numel() > self.most_unknown:
            return start
        found = [self._climb(likelihood, start, path) for path in self.paths]
        return min(found, key=likelihood.cost)

    def _climb(
        self, likelihood: LikelyImages, images: torch.Tensor, path: tuple[float, ...]
    ) -> torch.Tensor:
        for share in path:
            part = replace(likelihood, rows=share * likelihood.rows)
            images = part.maximum(images, self.iterations)
        return images


def closed_form(
    span: Span, patches: Patches, prior: ImagePrior, trust: float
) -> torch.Tensor:
    """Returns one image of which each patch's token is nearest to the span.

    Linear least squares for ``u / s`` and ``1 / s``; the prior takes s for what it is
    at the mean image.

    Args:
        span: of the observed rows; a direction counts as far as it is believed.
        patches: how tokens follow from pixels.
        prior: of the image.
        trust: weight of the span against the prior.

    Returns:
        Shape ``(1, pixels)``, in 0..1.
    """
    kept = 1 - (1 - span.weights).sqrt()
    out = torch.eye(patches.width).double()
    out -= span.directions.t() @ (kept[:, None] * span.directions)
    centred = patches.gain[:, None] * (patches.weight - patches.weight.mean(0))
    weight, target = out @ centred, -out @ patches.shift
    squares = weight.t() @ weight
    image = prior.mean.clone()
    scales = patches.embedded(prior.mean[None]).std(1)
    for numbers, offset, scale in zip(
        patches.places, patches.offsets, scales, strict=True
    ):
        mean = prior.mean[numbers]
        column = out @ (patches.gain * (offset - offset.mean()))
        wanted = torch.linalg.inv(prior.covariance(numbers)) * scale**2 / trust
        # Of (u, w): |weight u + column w - target|^2 + |u - mean w|^2 by the prior.
        cross = (weight.t() @ column - wanted @ mean)[:, None]
        corner = (column @ column + mean @ wanted @ mean).view(1, 1)
        matrix = torch.cat(
            [
                torch.cat([squares + wanted, cross], 1),
                torch.cat([cross.t(), corner], 1),
            ]
        )
        right = torch.cat([weight.t() @ target, (column @ target).view(1)])
        solution = torch.linalg.solve(matrix, right)
        image[numbers] = (solution[:-1] / solution[-1]).clamp(0, 1)
    return image[None]
