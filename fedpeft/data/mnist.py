"""MNIST: 5,000 of its grey images of digits, 28 x 28, 500 a class.

Which of its 250 and more writers wrote a digit is not known here. LeCun, Bottou, Bengio
& Haffner (1998).
"""

import numpy as np
import torch

from fedpeft import assets
from fedpeft.data.examples import Examples


def load() -> Examples:
    """Reads the asset ``mnist``: a row is an image's 784 pixels, then its digit.

    Raises:
        AssetError: if the asset has not been pulled.
    """
    path = assets.locate("mnist")
    rows = torch.from_numpy(np.loadtxt(path, dtype=np.uint8, delimiter=","))
    return Examples(
        contents=rows[:, :-1].reshape(-1, 28, 28).unbind(),
        labels=rows[:, -1].long(),
        groups=None,
        label_names=tuple("0123456789"),
    )
