"""Rotten Tomatoes: 12,808 snippets of film reviews, grouped by film.

A group is a film, not a person: snippets of one film are by different critics. 56 texts
occur twice.
"""

import bz2
import csv

import torch

from fedpeft import assets
from fedpeft.data.examples import Examples

LABELS = ("rotten", "fresh")


def load() -> Examples:
    """Reads the asset ``rotten-tomatoes``; film synopses and empty texts are dropped.

    Raises:
        AssetError: if the asset has not been pulled.
    """
    path = assets.locate("rotten-tomatoes")
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["category"] != "plot" and row["text"].strip()
        ]
    return Examples(
        contents=tuple(row["text"] for row in rows),
        labels=torch.tensor([LABELS.index(row["category"]) for row in rows]),
        groups=tuple(row["movie_name"] for row in rows),
        label_names=LABELS,
    )
