"""Emoji of two vendors: the same 1,906 signs, each drawn twice, 64 x 64, in colours.

A group is a vendor: the same classes look different from one to the other, which makes
a natural feature shift. Classes are the nine categories of Unicode; they are of unequal
size.
"""

import json

import torch

from fedpeft import assets
from fedpeft.data.examples import Examples
from fedpeft.data.images import read_image

LABELS = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
VENDORS = ("google", "twitter")


def load() -> Examples:
    """Reads the assets ``emoji-google`` and ``emoji-twitter``, one after the other.

    Variants of skin tone are left out, and so are the patches of skin tone themselves,
    which Unicode calls components. Transparent pixels are white.

    Raises:
        AssetError: if an asset has not been pulled.
    """
    folders = {vendor: assets.locate(f"emoji-{vendor}") for vendor in VENDORS}
    signs = [
        (sign["image"], LABELS.index(sign["category"]))
        for sign in json.loads((folders["google"] / "emoji.json").read_bytes())
        if sign["category"] in LABELS
        and all(sign[f"has_img_{vendor}"] for vendor in VENDORS)
    ]
    return Examples(
        contents=tuple(
            read_image(folder / "img" / vendor / "64" / image)
            for vendor, folder in folders.items()
            for image, _ in signs
        ),
        labels=torch.tensor([label for _, label in signs] * len(VENDORS)),
        groups=tuple(vendor for vendor in VENDORS for _ in signs),
        label_names=LABELS,
    )
