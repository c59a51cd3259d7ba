"""Images: the real data sets, folders of the user's own, and files that are none."""

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from fedpeft.data import Examples, load, partition, split
from fedpeft.data.image_folder import read
from fedpeft.data.images import MAX_PIXELS, read_image
from fedpeft.errors import ConfigError, DataError
from fedpeft.sections import DataSection, PartitionSection

RED, WHITE, BLUE = [255, 0, 0], [255, 255, 255], [0, 0, 255]


def section(name: str) -> DataSection:
    return DataSection(name=name, nominal_examples=512)


def test_fashion_mnist_is_complete_and_in_order(fashion_mnist: Path) -> None:
    assert fashion_mnist.is_dir()
    examples = load(section("fashion-mnist"))
    assert torch.bincount(examples.labels).tolist() == 10 * [7_000]
    assert torch.bincount(examples.labels[60_000:]).tolist() == 10 * [1_000]
    names = [examples.label_names[number] for number in examples.labels[:4].tolist()]
    assert names == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
    assert {(image.shape, image.dtype) for image in images(examples)} == {
        ((28, 28), torch.uint8)
    }


def test_mnist_has_five_hundred_of_each_digit(mnist: Path) -> None:
    assert mnist.exists()
    examples = load(section("mnist"))
    assert torch.bincount(examples.labels).tolist() == 10 * [500]
    assert examples.label_names[7] == "7"
    stack = torch.stack(images(examples))
    assert stack.shape == (5_000, 28, 28)
    assert stack.max() == 255
    # A nought is hollow, a one is not.
    centres = stack[:, 12:16, 12:16].float().mean((1, 2))
    assert centres[examples.labels == 0].mean() < 50
    assert centres[examples.labels == 1].mean() > 150


def test_emoji_are_the_same_signs_of_two_vendors(emoji: list[Path]) -> None:
    assert all(folder.is_dir() for folder in emoji)
    examples = load(section("emoji"))
    assert len(examples) == 2 * 1_906
    assert examples.groups is not None
    assert examples.groups == 1_906 * ("google",) + 1_906 * ("twitter",)
    assert examples.labels[:1_906].equal(examples.labels[1_906:])
    assert torch.bincount(examples.labels).min() == 2 * 85
    stack = torch.stack(images(examples))
    assert stack.shape == (3_812, 64, 64, 3)
    # Most drawings leave the corner free, and what is free is white.
    corners = stack[:, 0, 0].float().mean(1)
    assert (corners == 255).float().mean() > 0.9
    # The same sign, drawn anew.
    assert not stack[:1_906].equal(stack[1_906:])


def test_emoji_are_partitioned_by_vendor(emoji: list[Path]) -> None:
    assert all(folder.is_dir() for folder in emoji)
    examples = load(section("emoji"))
    clients = partition(examples, PartitionSection(name="by-group", num_clients=2))
    assert sorted(map(len, clients)) == [1_906, 1_906]


def images(examples: Examples) -> list[torch.Tensor]:
    found = [image for image in examples.contents if isinstance(image, torch.Tensor)]
    assert len(found) == len(examples)
    return found


def save(path: Path, array: object, **options: object) -> Path:
    """Writes an image of the array's own kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)  # type: ignore[arg-type]
    return path


def test_colours_come_out_as_they_are(tmp_path: Path) -> None:
    array = np.array([[RED, WHITE], [BLUE, RED], [WHITE, BLUE]], dtype=np.uint8)
    got = read_image(save(tmp_path / "a.png", array))
    assert got.dtype == torch.uint8
    assert got.tolist() == array.tolist()


def test_grey_has_three_equal_channels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 128]], dtype=np.uint8))
    assert read_image(path).tolist() == [[[0, 0, 0], [128, 128, 128]]]


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 128 * 256, 65_535]], dtype=np.uint16))
    assert read_image(path)[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    array = np.array([[[*RED, 255], [*RED, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    assert read_image(save(tmp_path / "a.png", array)).tolist() == [
        [RED, WHITE, [204, 204, 204]]
    ]


def test_transparent_colour_of_a_palette_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    assert read_image(tmp_path / "a.png").tolist() == [[RED, WHITE]]


def test_photo_taken_with_a_turned_camera_is_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise by a quarter
    array = np.array([[RED, BLUE]], dtype=np.uint8)
    path = save(tmp_path / "a.png", array, exif=turned)
    assert read_image(path).tolist() == [[RED], [BLUE]]


@pytest.mark.parametrize("ending", ["png", "tiff"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_grey_images_taken_with_a_turned_camera_are_upright(
    tmp_path: Path, ending: str, kind: type[np.unsignedinteger]
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    array = np.array([[0, np.iinfo(kind).max]], dtype=kind)
    path = save(tmp_path / f"a.{ending}", array, exif=turned)
    assert read_image(path)[..., 0].tolist() == [[0], [255]]


def test_format_is_told_by_the_content(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((1, 1, 3), np.uint8)).rename(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").shape == (1, 1, 3)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def claim(width: int, height: int) -> bytes:
    """Returns a small PNG that claims to be large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    return start + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def noise_png() -> bytes:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


BROKEN = {
    "empty": (b"", "a file of no format known here"),
    "text": (b"no image at all", "a file of no format known here"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a file of no format known here"),
    "truncated": (noise_png()[:1500], "a damaged one (image file is truncated"),
    "flipped": (
        noise_png()[:300] + b"\xff\x00" + noise_png()[302:],
        "a damaged one (",
    ),
    "too large": (claim(8_001, 8_000), f"one of more than {MAX_PIXELS} pixels"),
    "bomb": (claim(1 << 30, 1 << 30), f"one of more than {MAX_PIXELS} pixels"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_file_that_is_no_image_says_so_in_one_line(tmp_path: Path, kind: str) -> None:
    content, found = BROKEN[kind]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected an image, got {found}")
    assert message.endswith("; replace or remove it.")
    assert "\n" not in message


def test_missing_file_and_folder_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: expected .* got no such file;"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="got a folder;"):
        read_image(tmp_path)


def test_values_of_unknown_range_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", np.array([[0.5]], dtype=np.float32))
    with pytest.raises(DataError, match="whose range is not known"):
        read_image(path)


PIXEL = np.zeros((2, 2, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cats and a dog."""
    save(tmp_path / "cat/b.png", PIXEL)
    save(tmp_path / "cat/2024/a.JPG", PIXEL, format="JPEG")
    save(tmp_path / "dog/c.webp", PIXEL)
    return tmp_path


def test_folder_gives_files_by_label_and_name(folder: Path) -> None:
    examples = read(folder, ("dog", "cat", "cow"), "fatal")
    names = [str(Path(str(path)).relative_to(folder)) for path in examples.contents]
    assert names == ["dog/c.webp", "cat/2024/a.JPG", "cat/b.png"]
    assert examples.labels.tolist() == [0, 1, 1]
    assert examples.label_names == ("dog", "cat", "cow")
    assert examples.groups is None
    assert examples.persons is None


def test_folder_of_images_is_data_by_path(folder: Path) -> None:
    own = DataSection(
        path=str(folder), labels=("cat", "dog"), nominal_examples=1, test_fraction=0.34
    )
    splits = split(load(own), own)
    assert len(splits.train) + len(splits.test) == 3


def test_unreadable_images_are_named_and_counted(folder: Path) -> None:
    for number in range(5):
        (folder / f"dog/{number}.png").write_text("no image")
    with pytest.raises(DataError) as caught:
        read(folder, ("cat", "dog"), "fatal")
    message = str(caught.value)
    assert message.startswith(f"{folder}: 5 of 8 images cannot be read: {folder}/dog/0")
    assert "dog/2.png" in message
    assert "dog/3.png" not in message
    assert "and 2 more; replace or remove them, or set [data] unreadable" in message
    assert "\n" not in message


def test_unreadable_images_are_skipped_with_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cat/b.png").write_text("no image")
    with caplog.at_level(logging.WARNING):
        examples = read(folder, ("cat", "dog"), "skip")
    assert examples.labels.tolist() == [0, 1]
    (line,) = caplog.messages
    assert line.startswith(
        f"{folder}: 1 of 3 images cannot be read: {folder}/cat/b.png"
    )
    assert line.endswith("; they are left out")


def test_other_files_are_passed_over_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cat/notes.txt").write_text("")
    (folder / "cat/.DS_Store").write_text("")
    (folder / "README").write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(read(folder, ("cat", "dog"), "fatal")) == 3
    (line,) = caplog.messages
    assert line.endswith("do not end like an image's: notes.txt")


@pytest.mark.parametrize("unreadable", ["fatal", "skip"])
def test_folder_that_does_not_fit_says_why(
    folder: Path, unreadable: Literal["fatal", "skip"]
) -> None:
    with pytest.raises(
        DataError, match=r"dog: expected a folder of a label among 'cat'"
    ):
        read(folder, ("cat",), unreadable)
    with pytest.raises(DataError, match="got no such folder; correct"):
        read(folder / "none", ("cat", "dog"), unreadable)
    with pytest.raises(DataError, match="got a file; correct"):
        read(folder / "cat/b.png", ("cat", "dog"), unreadable)
    with pytest.raises(DataError, match="at least one image in a label's folder"):
        read(folder / "dog", ("cat", "dog"), unreadable)


@pytest.mark.parametrize(
    "label", ["../private/album", "..", ".", "", ".ssh", "/etc", "a/b", "a\\b", "a\0b"]
)
def test_label_leads_nowhere_but_into_the_folder(folder: Path, label: str) -> None:
    save(folder / "../private/album/x.png", PIXEL)
    with pytest.raises(DataError) as caught:
        read(folder / "nowhere", ("cat", label), "fatal")
    assert f"got {label!r}; correct [data] labels." in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text", "review"),
        ("label", "stars"),
        ("group", "site"),
        ("person", "patient"),
        ("multi_label", True),
        ("label_separator", "|"),
        ("prompt", "ask"),
    ],
)
def test_folder_of_images_has_no_columns(
    folder: Path, key: str, value: str | bool
) -> None:
    given = {"path": str(folder), "labels": ("cat", "dog"), key: value}
    with pytest.raises(ConfigError, match=rf"\[data\] {key}: .*, got a folder of im"):
        load(DataSection.model_validate(given))
    with pytest.raises(ConfigError, match=r"\[data\] completion: .*, got a folder"):
        load(DataSection(path=str(folder), completion="answer"))
