"""Reading of image files: one tensor an image, whatever the file holds."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from fedpeft.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""The names of image files end so, in small or capital letters."""

MAX_PIXELS = 64_000_000
"""A larger image is refused before its pixels are decoded: a small file may claim any
size, and 64 million pixels take 192 MB."""

# Pillow knows dozens more, and gives some to other programs to decode.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def read_image(path: Path) -> torch.Tensor:
    """Reads one image file as colours.

    Grey becomes three equal channels, transparency is laid on white, 16 bits become 8,
    the first frame stands for an animation, and the rotation that a camera noted is
    carried out. The format is told by the content, not by the name.

    Returns:
        uint8 of shape ``(height, width, 3)``: red, green, blue.

    Raises:
        DataError: if the file is missing, truncated, not an image, or too large.
    """
    try:
        # Ignored: what Pillow warns of does not keep it from decoding. An open file: a
        # path Pillow may map into memory, and it turns a mapped TIFF twice (13.0).
        with (
            warnings.catch_warnings(action="ignore"),
            path.open("rb") as file,
            Image.open(file, formats=_FORMATS) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return torch.from_numpy(np.array(_colours(image)))
    except Exception as error:  # whatever a damaged file makes the decoders raise
        raise DataError(
            f"{path}: expected an image, got {_found(error)}; replace or remove it."
        ) from None


def _colours(image: Image.Image) -> Image.Image:
    """Returns the image upright in red, green and blue, on white if see-through."""
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, whose range is not known")
    upright = ImageOps.exif_transpose(image)  # first: an array has no such note
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.array(upright) >> 8).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")


def _found(error: Exception) -> str:
    """Says what lies there instead of an image."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "a folder"
        case PermissionError():
            return "a file that this account may not read"
        case UnidentifiedImageError():
            return "a file of no format known here"
        case Image.DecompressionBombError():
            return f"one of more than {MAX_PIXELS} pixels"
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return f"a damaged one ({reason})"
