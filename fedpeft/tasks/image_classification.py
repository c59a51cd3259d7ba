"""Which class, or classes, an image belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from fedpeft.backbone import Backbone
from fedpeft.data import Batch, Encoded, Examples, person_numbers, read_image
from fedpeft.errors import ConfigError
from fedpeft.sections import DataSection
from fedpeft.tasks.classes import Classification, main_metric
from fedpeft.tasks.module import TaskModule
from fedpeft.tasks.task import contents_of


class ImageClassifier(TaskModule):
    """Backbone, what stands for the whole image, linear head."""

    def forward(
        self, pixel_values: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Maps ``(batch, 3, height, width)`` to logits ``(batch, labels)``."""
        assert self.head is not None
        features = self.features({"pixel_values": pixel_values}, kept)
        logits: torch.Tensor = self.head(features)
        return logits

    def pool(
        self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Returns the class token's features, shape ``(batch, features)``."""
        return hidden[:, 0]


class Dinov2Classifier(ImageClassifier):
    """Adds the mean over the patches, as DINOv2's own classifier does."""

    def pool(
        self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Returns both beside each other, shape ``(batch, 2 * features)``."""
        return torch.cat((hidden[:, 0], hidden[:, 1:].mean(1)), 1)


@dataclass(frozen=True)
class ImageClassification(Classification):
    """An image in, a class out.

    Attributes:
        image_size: to which every image is scaled, in pixels; height and width.
        mean: of each channel in 0..1, which is subtracted.
        deviation: of each channel, by which is divided.
        metric: see :func:`main_metric`.
    """

    image_size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    metric: str = "accuracy"

    @classmethod
    def of(cls, backbone: Backbone, data: DataSection) -> "ImageClassification":
        """Wants patches, and images that they can cover."""
        config = backbone.module.config
        if not hasattr(config, "patch_size"):
            raise ConfigError(
                f"[model] task: expected a backbone for images, got {backbone.name!r}, "
                "which has no patch size."
            )
        size = config.image_size if data.image_size is None else data.image_size
        if size % config.patch_size:
            raise ConfigError(
                f"[data] image_size: expected a multiple of the backbone's patches of "
                f"{config.patch_size} pixels, got {size}."
            )
        if config.model_type != "dinov2" and size != config.image_size:
            raise ConfigError(
                f"[data] image_size: expected {config.image_size}, the only size that "
                f"this backbone takes, got {size}."
            )
        mean, deviation = backbone.channels_mean, backbone.channels_deviation
        return cls(size, mean, deviation, main_metric(data))

    def build(self, backbone: Backbone, num_labels: int) -> ImageClassifier:
        """Puts a linear head on the class token, for DINOv2 on the patches' mean too.

        As the classifiers of `transformers` for these backbones do.
        """
        size = backbone.hidden_size
        if backbone.module.config.model_type == "dinov2":
            return Dinov2Classifier(backbone.module, 2 * size, num_labels)
        return ImageClassifier(backbone.module, size, num_labels)

    def encode(self, examples: Examples) -> Encoded:
        """Reads and scales every image; grey ones stay grey until they are needed."""
        kinds = (Path, torch.Tensor)
        images: list[Path | torch.Tensor] = contents_of(
            examples, *kinds, task="image-classification"
        )
        pixels = [
            _scaled(
                read_image(image) if isinstance(image, Path) else image, self.image_size
            )
            for image in images
        ]
        return Encoded(pixels, examples.labels, person_numbers(examples.persons))

    def collate(self, encoded: Encoded, indices: Sequence[int]) -> Batch:
        """Stacks and normalises, shape ``(batch, 3, height, width)``."""
        chosen = encoded.subset(indices)
        colour = [
            image if image.dim() == 3 else image.unsqueeze(2).expand(-1, -1, 3)
            for image in chosen.inputs
        ]
        pixels = torch.stack(colour).movedim(3, 1).float() / 255
        mean, deviation = (
            torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.deviation)
        )
        return Batch({"pixel_values": (pixels - mean) / deviation}, chosen.labels)


def _scaled(image: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the image with both sides of `size` pixels, uint8."""
    if image.shape[:2] == (size, size):
        return image
    planes = image.reshape(*image.shape[:2], -1).movedim(2, 0).unsqueeze(0).float()
    scaled = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    rounded = scaled.round().clamp(0, 255).to(torch.uint8)[0].movedim(0, 2)
    return rounded.squeeze(2) if image.dim() == 2 else rounded
