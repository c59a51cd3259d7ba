"""Fashion-MNIST: 70,000 grey images of clothes, 28 x 28, 7,000 a class.

Whose photographs they are is not known. Xiao, Rasul & Vollgraf (2017),
https://arxiv.org/abs/1708.07747.
"""

import gzip
from pathlib import Path

import torch

from fedpeft import assets
from fedpeft.data.examples import Examples

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load() -> Examples:
    """Reads the asset ``fashion-mnist``: the 60,000 of ``train``, then the 10,000.

    Raises:
        AssetError: if the asset has not been pulled.
    """
    folder = assets.locate("fashion-mnist")
    images, labels = [], []
    for part in ("train", "t10k"):
        pixels = _values(folder / f"{part}-images-idx3-ubyte.gz", header=16)
        images.append(pixels.view(-1, 28, 28))
        labels.append(_values(folder / f"{part}-labels-idx1-ubyte.gz", header=8))
    return Examples(
        contents=torch.cat(images).unbind(),
        labels=torch.cat(labels).long(),
        groups=None,
        label_names=LABELS,
    )


def _values(path: Path, *, header: int) -> torch.Tensor:
    """Returns the bytes of an idx file after its header, flat."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    return torch.frombuffer(content, dtype=torch.uint8, offset=header)
