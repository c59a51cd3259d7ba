"""How like the true images a guess is; every score is one value a true image.

Source of SSIM: Wang et al. (2004), Image quality assessment, section III-B.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from fedpeft.attacks._images import pixels_of, prior_of
from fedpeft.attacks.attack import Attack, Case, Observation, Scores, Secret, View

IMAGE_METRICS = {"psnr": "dB", "ssim": "", "identification_top1": "share"}
"""What attacks that return images are scored by -> its unit."""

_MOST_DECIBELS = 100.0
_SMALL = 32


class ImageAttack(Attack[torch.Tensor]):
    """Guesses images in 0..1, shape ``(n, channels, height, width)``."""

    metrics: ClassVar[dict[str, str]] = IMAGE_METRICS

    def score(self, guess: torch.Tensor, secret: Secret) -> Scores:
        """Compares pixels, and looks for the true image among decoys."""
        return image_scores(guess, secret)

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Guesses the mean of the public images; a medium grey without any."""
        prior = prior_of(observation.knowledge)
        return image_scores(prior.mean.view(1, *prior.shape), secret)

    def shown(self, guess: torch.Tensor, case: Case) -> tuple[View, View]:
        """Shows the first image and the guess that is compared with it."""
        truth = pixels_of(case.secret.examples)
        return truth[0], _matched(guess, truth)[0]


def image_scores(guess: torch.Tensor, secret: Secret) -> Scores:
    """Compares guessed images with the true ones, whatever their order.

    **Guarantees**: each true image is compared with one guess, such that the sum of the
    squared errors is the least; no guess serves twice unless there are too few.

    Args:
        guess: in 0..1, shape ``(n, channels, height, width)``, 1 or 3 channels.
        secret: with decoys where ``identification_top1`` is wanted.
    """
    truth = pixels_of(secret.examples)
    matched = _matched(guess, truth)
    scores = {"psnr": psnr(matched, truth), "ssim": ssim(matched, truth)}
    if secret.decoys is not None:
        decoys = pixels_of(secret.decoys)
        scores["identification_top1"] = identified(matched, truth, decoys)
    return scores


def _matched(guess: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Returns one guess for each true image, of its shape."""
    guess = guess.double().clamp(0, 1)
    if guess.shape[1] > truth.shape[1]:
        guess = guess.mean(1, keepdim=True)
    guess = guess.expand(-1, truth.shape[1], -1, -1)
    guess = guess.repeat(-(-len(truth) // len(guess)), 1, 1, 1)
    errors = torch.cdist(truth.flatten(1), guess.flatten(1)).square()
    chosen = linear_sum_assignment(errors.numpy())[1]
    return guess[torch.from_numpy(chosen)]


def psnr(guess: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Returns the peak signal-to-noise ratio, dB, at most 100, shape ``(n,)``.

    >>> half = torch.full((1, 1, 2, 2), 0.5)
    >>> round(psnr(half, half + 0.1).item(), 3), psnr(half, half).item()
    (20.0, 100.0)
    """
    error = (guess - truth).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=1e-30).log10()).clamp(max=_MOST_DECIBELS)


def ssim(guess: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Returns the structural similarity, -1 to 1, shape ``(n,)``.

    Its window is a Gaussian of 11 x 11 pixels, deviation 1.5; of 7 x 7 for images of at
    most 32 pixels, deviation 1. Only windows that lie wholly within the image count.
    """
    size, deviation = (7, 1.0) if min(truth.shape[2:]) <= _SMALL else (11, 1.5)
    size = min(size, *truth.shape[2:])
    window = _window(size, deviation).to(truth)
    a, b = guess.flatten(0, 1).unsqueeze(1), truth.flatten(0, 1).unsqueeze(1)

    def local_mean(images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, window)

    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a = local_mean(a * a) - mean_a**2
    variance_b = local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2  # the paper's, for pixels in 0..1
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).view(*truth.shape[:2], -1).mean((1, 2))


def _window(size: int, deviation: float) -> torch.Tensor:
    places = torch.arange(size).double() - (size - 1) / 2
    line = torch.exp(-(places**2) / (2 * deviation**2))
    plane = line[:, None] * line[None]
    return (plane / plane.sum()).view(1, 1, size, size)


def identified(
    guess: torch.Tensor, truth: torch.Tensor, decoys: torch.Tensor
) -> torch.Tensor:
    """Returns 1 where no decoy is as near to the guess as the truth, else 0, ``(n,)``.

    By the angle between the images less their means, which brightness and contrast do
    not change.
    """
    mine, true, others = (
        F.normalize((part - part.mean((1, 2, 3), keepdim=True)).flatten(1))
        for part in (guess, truth, decoys)
    )
    best_other = (mine @ others.t()).amax(1)
    return ((mine * true).sum(1) > best_other).double()
