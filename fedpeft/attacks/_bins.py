"""Bins for tokens, made of a bottleneck adapter, and what fell into them.

Every row of the first matrix has one direction, and every bias another threshold along
it, so that a row answers to the tokens above its threshold alone.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fedpeft.attacks.attack import Seen
from fedpeft.tensors import Tensors

_DOWN, _UP = ".down.weight", ".up.weight"
_COMPONENTS = 8
_FAR = 2.0
"""Times the median norm; beyond are special tokens, which would take all the bins."""


def places_of_bins(state: Tensors) -> list[str]:
    """Returns how the names of adapters with a threshold begin, the lowest first."""
    found = [name.removesuffix(_DOWN) for name in state if name.endswith(_DOWN)]
    ends = (".down.bias", _UP, ".up.bias")
    return [place for place in found if all(f"{place}{end}" in state for end in ends)]


def modules_below(places: Sequence[str]) -> list[str]:
    """Returns the layers whose inputs the bins divide."""
    return [f"{place}.down" for place in places]


def close(state: Tensors, place: str) -> None:
    """Makes one adapter do nothing."""
    state[f"{place}{_UP}"].zero_()
    state[f"{place}.up.bias"].zero_()


def make_bins(
    state: Tensors,
    place: str,
    tokens: torch.Tensor,
    rng: torch.Generator,
    *,
    sharpness: float,
    strength: float,
) -> None:
    """Overwrites one adapter.

    Args:
        state: in which it is overwritten.
        place: how its names begin.
        tokens: public inputs of it, shape ``(tokens, width)``; set the thresholds.
        rng: draws the directions.
        sharpness: what lies a bin's width above a threshold measures so much.
        strength: norm of the column that carries a bin's output on.
    """
    width, features = state[f"{place}{_DOWN}"].shape
    norms = tokens.norm(dim=1)
    tokens = tokens[norms < _FAR * norms.median()]
    _, spread, axes = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    drawn = normal(min(_COMPONENTS, len(spread)), rng)
    axis = F.normalize((drawn * spread[: len(drawn)]) @ axes[: len(drawn)], dim=0)
    thresholds = torch.quantile(tokens @ axis, (torch.arange(width) + 0.5) / width)
    scale = sharpness / thresholds.diff().median()
    state[f"{place}{_DOWN}"] = (scale * axis).repeat(width, 1)
    state[f"{place}.down.bias"] = -scale * thresholds
    # Four neighbours of these signs cancel for what lies above all of them.
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(width)[:width]
    carrier = F.normalize(normal(features, rng), dim=0)
    state[f"{place}{_UP}"] = strength * carrier[:, None] * signs


def caught_in_bins(place: str, seen: Seen) -> torch.Tensor:
    """Returns one vector a bin in which something is, shape ``(n, width)``."""
    up = seen.state[f"{place}{_UP}"].double()
    signs = torch.sign(up.t() @ up[:, 0])
    rows, sums = (
        _differences(signs, seen.update[f"{place}.down.{part}"].double())
        for part in ("weight", "bias")
    )
    vectors = (rows / sums[:, None]).float()
    return vectors[vectors.isfinite().all(1)]


def _differences(signs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns each row minus the next, and the last; as if all had the same sign."""
    same = (signs * rows.t()).t()
    return torch.cat((same[:-1] - same[1:], same[-1:]))


def normal(count: int, rng: torch.Generator) -> torch.Tensor:
    """Returns as many standard normal values."""
    return torch.randn(count, generator=rng)
