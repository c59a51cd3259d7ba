"""Images: scaled once, normalised in the batch, read by their class token."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, Dinov2Config, Dinov2ForImageClassification

from fedpeft.backbone import Backbone, load_backbone
from fedpeft.data import Examples
from fedpeft.errors import ConfigError, DataError
from fedpeft.sections import DataSection
from fedpeft.tasks import ImageClassification
from tests.helpers import tiny_bert, tiny_vit

HALF = (0.5, 0.5, 0.5)


def images(*contents: object) -> Examples:
    labels = torch.zeros(len(contents), dtype=torch.int64)
    return Examples(tuple(contents), labels, None, ("cat", "dog"))


def section(**keys: object) -> DataSection:
    return DataSection(name="mnist", **keys)


def backbone(module: object, name: str = "tiny") -> Backbone:
    return Backbone(name, module, None, 32, "fingerprint")


def test_grey_pixels_become_three_normalised_channels() -> None:
    task = ImageClassification(2, HALF, HALF)
    grey = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8)
    encoded = task.encode(images(grey))
    assert torch.equal(encoded.inputs[0], grey)
    pixels = task.collate(encoded, [0]).inputs["pixel_values"]
    assert pixels.shape == (1, 3, 2, 2)
    # (x / 255 - 0.5) / 0.5: black is -1, white is 1.
    expected = torch.tensor([[-1.0, 1.0], [-0.6, -0.2]])
    assert torch.allclose(pixels[0], expected.expand(3, 2, 2))


def test_sizes_and_colours_may_differ_within_a_batch(tmp_path: Path) -> None:
    Image.new("RGB", (9, 5), (255, 0, 0)).save(tmp_path / "red.png")
    task = ImageClassification(4, HALF, HALF)
    grey = torch.zeros(28, 28, dtype=torch.uint8)
    encoded = task.encode(images(tmp_path / "red.png", grey))
    assert [tuple(image.shape) for image in encoded.inputs] == [(4, 4, 3), (4, 4)]
    pixels = task.collate(encoded, [0, 1]).inputs["pixel_values"]
    assert torch.equal(pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(pixels[1], torch.full((3, 4, 4), -1.0))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError, match=r"broken\.png"):
        ImageClassification(4, HALF, HALF).encode(images(tmp_path / "broken.png"))


def test_the_backbone_says_which_sizes_there_are() -> None:
    vit = backbone(tiny_vit())
    assert ImageClassification.of(vit, section()).image_size == 32
    with pytest.raises(ConfigError, match="multiple of the backbone's patches of 8"):
        ImageClassification.of(vit, section(image_size=30))
    with pytest.raises(ConfigError, match="expected 32, the only size"):
        ImageClassification.of(vit, section(image_size=40))
    with pytest.raises(ConfigError, match="'minilm', which has no patch size"):
        ImageClassification.of(backbone(tiny_bert(), "minilm"), section())


def test_texts_are_no_images() -> None:
    task = ImageClassification(4, HALF, HALF)
    with pytest.raises(ConfigError, match="image-classification, got texts"):
        task.encode(images("a text"))


def test_dinov2_is_read_as_its_own_classifier_reads_it() -> None:
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        num_labels=3,
    )
    torch.manual_seed(0)
    theirs = Dinov2ForImageClassification(config).eval()
    task = ImageClassification(28, HALF, HALF)
    ours = task.build(backbone(theirs.dinov2), 3).eval()
    ours.head.load_state_dict(theirs.classifier.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.allclose(ours(pixels), theirs(pixels).logits, atol=1e-6)


def test_the_real_vit_separates_real_digits(vit_s: Path, mnist: Path) -> None:
    from fedpeft.data import mnist as digits

    model = load_backbone("vit-s")
    assert isinstance(model.module, AutoModel._model_mapping[type(model.module.config)])
    task = ImageClassification.of(model, section(image_size=28))
    examples = digits.load().subset([*range(0, 5000, 100)])
    module = task.build(model, 10).eval()
    encoded = task.encode(examples)
    with torch.no_grad():
        batch = task.collate(encoded, [*range(len(encoded))])
        features = F.normalize(module.features(batch.inputs), dim=1)
    same = batch.labels[:, None] == batch.labels
    alike = features @ features.t()
    others = ~torch.eye(len(alike), dtype=torch.bool)
    assert alike[same & others].mean() > alike[~same].mean() + 0.02
