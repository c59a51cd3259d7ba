"""The part of observed rows that stands out of their noise."""

from collections.abc import Sequence

import torch

from fedpeft.attacks._span import rounding, stacked_rows
from fedpeft.attacks.attack import Observation, Seen
from fedpeft.tensors import Tensors, flatten


def signal_rows(
    observation: Observation, names: Sequence[str], most: int
) -> torch.Tensor:
    """Returns the rows' significant part, in units of the noise of one entry.

    The noise is at least what rounding does; under privacy as much as the update is
    large, since there it is hardly anything else; and what the rows have beyond the
    directions that tokens can give them.

    Args:
        observation: of one client.
        names: of the matrices that read the tokens.
        most: how many directions there can be.

    Returns:
        Shape ``(k, width)``, k at most `most`: singular vectors by their values. Left
        out is what noise alone may give: singular values up to the edge ``sqrt(rows) +
        sqrt(width)`` of Marchenko & Pastur (1967).
    """
    seen = observation.seen
    deviations = [_noise(part, observation.knowledge.is_noised) for part in seen]
    rows = stacked_rows([part.update for part in seen], deviations, names)
    if len(rows) == 0:
        return rows
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    count, width = rows.shape
    free = max(1, (count - most) * (width - most))
    level = max(1.0, float(values[most:].square().sum() / free) ** 0.5)
    values = values[:most] / level
    significant = values > 1.1 * (count**0.5 + width**0.5)
    signal: torch.Tensor = (values[:, None] * directions[:most])[significant]
    return signal


def _noise(seen: Seen, is_noised: bool) -> Tensors:
    """Returns the deviation of the noise on each entry of an update."""
    deviations = rounding(seen.state, seen.update)
    if not is_noised:
        return deviations
    level = flatten(seen.update).double().square().mean().sqrt()
    return {name: entry.clamp(min=level) for name, entry in deviations.items()}
