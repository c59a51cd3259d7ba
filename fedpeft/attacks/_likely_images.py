"""The images under which the rows that were observed are most likely.

A trained matrix that reads tokens X has rows ``D X`` plus noise, with D unknown. With
the best D for each X the rows' likelihood is their distance from the span of X alone,
which is minimised over the pixels, together with what the prior says of these, by
Gauss and Newton's method with damping.

Source: Golub & Pereyra (1973), the variable projection method; the derivative without
its second term, Kaufman (1975).
"""

from dataclasses import dataclass

import torch

from fedpeft.attacks._images import ImagePrior
from fedpeft.attacks._patches import Patches

_OUTSIDE = 0.01
"""By how much, in 0..1, a pixel may well leave its range."""


@dataclass(frozen=True, eq=False)
class LikelyImages:
    """A likelihood of images given rows, and the search for its maximum.

    Attributes:
        rows: in units of the noise of one entry, shape ``(n, width)``.
        patches: how tokens follow from pixels.
        prior: of one image.
    """

    rows: torch.Tensor
    patches: Patches
    prior: ImagePrior

    def distance(self, images: torch.Tensor) -> float:
        """Returns the squared distance of the rows from the images' tokens' span.

        Args:
            images: shape ``(num_images, pixels)``.
        """
        _, outside = self._projected(self.patches.tokens(images))
        return float(outside.square().sum())

    def cost(self, images: torch.Tensor) -> float:
        """Returns the negative logarithm of likelihood and prior, up to a constant."""
        away = images - self.prior.mean
        beyond = (images - images.clamp(0, 1)) / _OUTSIDE
        prior = (away @ self.prior.precision * away).sum() + beyond.square().sum()
        return (self.distance(images) + float(prior)) / 2

    def maximum(self, start: torch.Tensor, iterations: int) -> torch.Tensor:
        """Returns the most likely images near `start`, ``(num_images, pixels)``.

        **Guarantees**: their cost is not above that of `start`.
        """
        images, cost, damping = start, self.cost(start), 1e-3
        for _ in range(iterations):
            matrix, slope = self._system(images)
            before = cost
            while damping < 1e6:
                damped = matrix + torch.diag(damping * matrix.diagonal())
                factor, failed = torch.linalg.cholesky_ex(damped)
                step = torch.cholesky_solve(-slope[:, None], factor).view_as(images)
                cost = before if failed else self.cost(images + step)
                if cost < before:
                    images, damping = images + step, max(damping / 10, 1e-9)
                    break
                damping *= 10
            if not cost < before * (1 - 1e-6):
                break
        return images

    def _projected(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns an orthonormal basis of the tokens, and the rows outside of it."""
        basis = torch.linalg.qr(tokens.t())[0]
        return basis, self.rows - (self.rows @ basis) @ basis.t()

    def _system(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns curvature ``(unknown, unknown)`` and gradient of the cost."""
        patches, fixed = self.patches, len(self.patches.fixed)
        tokens = patches.tokens(images)
        basis, outside = self._projected(tokens)
        mix = torch.linalg.lstsq(tokens.t(), self.rows.t()).solution[fixed:]
        slopes = self._slopes(images)
        slopes = slopes - basis @ (basis.t() @ slopes)  # (tokens, width, q)
        n, width, q = slopes.shape
        flat = slopes.movedim(1, 0).reshape(width, n * q)
        products = (flat.t() @ flat).view(n, q, n, q)
        curvature = products * (mix @ mix.t())[:, None, :, None]
        pull = -((mix @ outside)[:, None] @ slopes).squeeze(1)
        return self._with_prior(images, curvature.view(n * q, n * q), pull)

    def _slopes(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the derivative of each token by its pixels, ``(tokens, width, q)``.

        Of ``gain * (e - mean(e)) / s + shift``, where e is affine in the pixels.
        """
        embedded = self.patches.embedded(images)
        centred = embedded - embedded.mean(1, keepdim=True)
        scale = (centred.square().mean(1, keepdim=True) + self.patches.eps).sqrt()
        unit = centred / scale
        weight = self.patches.weight - self.patches.weight.mean(0)
        along = (unit @ weight) / self.patches.width
        slopes = weight - unit[:, :, None] * along[:, None]
        return slopes * (self.patches.gain / scale)[:, :, None]

    def _with_prior(
        self, images: torch.Tensor, curvature: torch.Tensor, pull: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts patches where their pixels are, and adds the prior's part."""
        num_images, pixels = images.shape
        first = torch.arange(num_images).view(-1, 1, 1) * pixels
        order = (first + self.patches.places).flatten()
        matrix = torch.kron(torch.eye(num_images), self.prior.precision)
        matrix[order[:, None], order[None]] += curvature
        beyond = images - images.clamp(0, 1)
        matrix.diagonal().add_((beyond != 0).flatten() / _OUTSIDE**2)
        away = (images - self.prior.mean) @ self.prior.precision
        slope = (away + beyond / _OUTSIDE**2).flatten()
        slope[order] += pull.flatten()
        return matrix, slope
