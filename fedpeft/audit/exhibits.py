"""A few records to look at: what they are, and what an attack made of them."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from fedpeft.attacks.attack import Attack, Case, View
from fedpeft.audit.results import Exhibit

_LARGEST = 112
"""Pixels of an exhibit's longer side; larger images are made smaller."""


def choose_exhibits(
    attack: Attack[Any],
    cases: Sequence[Case],
    guesses: Sequence[tuple[Any, Any]],
    scores: Sequence[tuple[float, float]],
) -> tuple[Exhibit, ...]:
    """Returns the best, the middle and the worst read of the victims, best first.

    Of two victims both; none where the attack has nothing to look at. Each is its
    client's first record.

    Args:
        attack: that guessed.
        cases: one a victim.
        guesses: of each victim, of what was seen of it and of its control.
        scores: of both guesses, for the first record, by the attack's headline.
    """
    order = sorted(range(len(cases)), key=lambda victim: -scores[victim][0])
    chosen = {order[place] for place in (0, len(order) // 2, -1)} if order else set()
    found = [
        _exhibit(attack, cases[victim], guesses[victim], scores[victim])
        for victim in order
        if victim in chosen
    ]
    return tuple(each for each in found if each is not None)


def _exhibit(
    attack: Attack[Any],
    case: Case,
    guesses: tuple[Any, Any],
    scores: tuple[float, float],
) -> Exhibit | None:
    mine, other = (attack.shown(guess, case) for guess in guesses)
    if mine is None or other is None:
        return None
    return Exhibit(
        "text" if isinstance(mine[0], str) else "image",
        truth=_as_text(mine[0]),
        guess=_as_text(mine[1]),
        control=_as_text(other[1]),
        score=scores[0],
        control_score=scores[1],
    )


def _as_text(view: View) -> str:
    return view if isinstance(view, str) else to_png(view)


def to_png(image: torch.Tensor) -> str:
    """Returns pixels in 0..1 as a PNG file in base64, grey if there is one channel.

    Args:
        image: shape ``(1 or 3, height, width)``.
    """
    pixels = (255 * image.clamp(0, 1)).round().to(torch.uint8)
    grey = len(pixels) == 1
    picture = Image.fromarray((pixels[0] if grey else pixels.movedim(0, 2)).numpy())
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
