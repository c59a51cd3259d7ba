"""Would an honest server send this? What a client can tell from the state alone.

Nothing here looks at a record, so a client may refuse by it without its refusal telling
of its data. What is compared is the state that a client is asked to start from, with
the one that it builds itself from the run's configuration.

**Guarantees**: none against an adversary who knows these checks and hides. They find
what makes bins of an adapter (the same direction in every row, thresholds in order),
and values beyond what the plan's rounds can have moved; whoever spreads both over many
honest-looking rows is found by neither. Rows are compared where a bias beside them can
be their thresholds; virtual tokens and LoRA's factors, which have none, may all come to
one direction in honest training. So may a matrix of which a row starts at zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from fedpeft.config import RunConfig
from fedpeft.tensors import Tensors

Kind = Literal["not-finite", "not-the-start", "too-far", "same-rows", "ladder"]

_FEWEST_ROWS = 4
_SAME = 0.99
"""Cosine of two rows that are one direction."""
_SHARE = 0.5
"""Of the pairs of rows: two alike may be, half of all are made."""
_FEWEST_STEPS = 10
"""Values in strict order: of random sets, one in 1.8 million is, up or down."""
_ADAM = 10**0.5
"""The most that AdamW moves a value in a step, in learning rates."""
_ROOM = 10.0
"""Times what the rounds can move, for momenta, feedback and the noise's tails."""


@dataclass(frozen=True)
class Finding:
    """One reason to refuse a state.

    Attributes:
        tensor: its name.
        kind: of what was found.
        detail: one sentence.
    """

    tensor: str
    kind: Kind
    detail: str


def inspect(
    state: Tensors,
    start: Tensors,
    config: RunConfig,
    server_round: int,
    noise_multiplier: float = 0.0,
) -> list[Finding]:
    """Returns what speaks against a state; empty if nothing does.

    Args:
        state: that the client is asked to start from.
        start: the state before the first round, as the client builds it.
        config: of the run.
        server_round: from 1; in the first the state is the start, bit for bit.
        noise_multiplier: of the plan, where clients add noise.

    Raises:
        ValueError: if the names or shapes are not those of the start.
    """
    shapes = {name: tensor.shape for name, tensor in start.items()}
    if shapes != {name: tensor.shape for name, tensor in state.items()}:
        raise ValueError(
            f"Expected {len(start)} tensors as the method makes them, got others."
        )
    most = reach(config, server_round, noise_multiplier)
    return [
        finding
        for name in state
        for finding in (
            *_findings(name, state[name], start[name], server_round, most),
            *_bins(name, state, start),
        )
    ]


def _findings(
    name: str,
    tensor: torch.Tensor,
    start: torch.Tensor,
    server_round: int,
    most: float | None,
) -> Iterator[Finding]:
    if not tensor.isfinite().all():
        yield Finding(name, "not-finite", "A value is no finite number.")
        return
    moved = float((tensor.double() - start.double()).abs().max())
    if server_round == 1 and moved > 0:
        detail = f"The first round starts elsewhere, by up to {moved:.2g}."
        yield Finding(name, "not-the-start", detail)
    elif most is not None and moved > most:
        detail = f"A value has moved by {moved:.2g}, the rounds can move it {most:.2g}."
        yield Finding(name, "too-far", detail)
    if _is_ladder(tensor) and not _is_ladder(start):
        detail = f"{len(tensor)} values stand in order, as thresholds of bins do."
        yield Finding(name, "ladder", detail)


def _bins(name: str, state: Tensors, start: Tensors) -> Iterator[Finding]:
    """Looks for rows of one direction in a matrix that has thresholds."""
    thresholds = f"{name.removesuffix('weight')}bias"
    if not name.endswith("weight") or thresholds not in state:
        return
    share = _same_rows(state[name])
    if share > _SHARE >= _same_rows(start[name]) and start[name].any(1).all():
        detail = f"{share:.0%} of the pairs of rows are one direction."
        yield Finding(name, "same-rows", detail)


def reach(
    config: RunConfig, server_round: int, noise_multiplier: float = 0.0
) -> float | None:
    """Returns how far an honest value can have moved from its start before a round.

    Ten times what AdamW moves in so many steps, or what clipped gradients and one
    deviation of their noise do under SGD; the server's optimiser enters by its rate.
    None where nothing bounds it: plain SGD on gradients that nobody clips at the
    client, an unknown number of steps, or adaptive steps of the server.
    """
    gain, steps, training = _gain(config), _local_steps(config), config.training
    if gain is None or steps is None:
        return None
    rate = max(training.learning_rate, training.head_learning_rate or 0.0)
    if training.optimizer == "adamw":
        a_round = _ADAM * rate * steps
    elif config.is_dp_sgd:
        noise = noise_multiplier * steps**0.5 / training.batch_size
        norm = config.privacy.clipping_norm
        a_round = rate * norm * (steps + noise) / (1 - training.momentum)
    else:
        return None
    return _ROOM * gain * a_round * (server_round - 1)


def _gain(config: RunConfig) -> float | None:
    """Returns by how much the server's optimiser lengthens steps, at least 1."""
    server = config.aggregation.server_optimizer
    if server is None:
        return 1.0
    if server.name not in ("sgd", "momentum"):
        return None
    rate = float(server.options.get("learning_rate", 1.0))
    usual = 0.9 if server.name == "momentum" else 0.0
    return max(1.0, rate / (1 - float(server.options.get("momentum", usual))))


def _local_steps(config: RunConfig) -> float | None:
    """Returns the steps of a round, a public number; None if it is not known."""
    units = config.nominal_units
    if not units:
        return None
    return max(1.0, config.training.local_epochs * units / config.training.batch_size)


def _same_rows(tensor: torch.Tensor) -> float:
    """Returns the share of the pairs of rows that are one direction, 0 to 1.

    0 for what has few rows, is longer than wide (as a factor that starts at zero, and
    soon has one direction by right), or is no matrix.

    >>> _same_rows(torch.ones(4, 8))
    1.0
    >>> _same_rows(torch.eye(4, 8))
    0.0
    """
    if tensor.dim() != 2 or not _FEWEST_ROWS <= len(tensor) < tensor.shape[1]:
        return 0.0
    rows = F.normalize(tensor.double(), dim=1)
    cosines = (rows @ rows.t()).abs()
    pairs = len(rows) * (len(rows) - 1)
    same = int((cosines > _SAME).sum()) - int((cosines.diagonal() > _SAME).sum())
    return same / pairs


def _is_ladder(tensor: torch.Tensor) -> bool:
    """Tells whether a vector's values rise or fall one by one.

    >>> _is_ladder(torch.arange(10.0)), _is_ladder(torch.ones(10))
    (True, False)
    """
    if tensor.dim() != 1 or len(tensor) < _FEWEST_STEPS:
        return False
    steps = tensor.double().diff()
    return bool((steps > 0).all() or (steps < 0).all())
