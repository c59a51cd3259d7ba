"""From what a client sent to its gradient: a value and a deviation for each entry.

Whatever stands between a gradient and its release is public: the optimiser, the number
format, what a compressor drops, the size of the noise. So an adversary undoes what can
be undone, and knows how exact each entry of the rest is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedpeft.attacks._span import rounding
from fedpeft.attacks.attack import Knowledge, Seen
from fedpeft.config import RunConfig
from fedpeft.tensors import Tensors, flatten, scale

_ADAM_EPSILON = 1e-8
"""Of ``torch.optim.AdamW``, as clients run it."""

_BITS = {"fp32": 24, "fp16": 11, "bf16": 8}
"""Of the numbers in which updates travel, the leading one counted."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one update tells of the gradient, up to a factor that all entries share.

    Attributes:
        values: of the parameters' shapes, in doubles.
        deviations: of the error on each entry, in doubles.
    """

    values: Tensors
    deviations: Tensors


def read(seen: Seen, knowledge: Knowledge, relative_noise: float = 0.0) -> Reading:
    """Reads one round's update as far as it goes.

    Args:
        seen: the state sent and the update received.
        knowledge: the compression and, for an adversary of C and above, the optimiser
            are taken from its configuration; from its model, what the head is.
        relative_noise: that each tensor is known to carry, over its own norm.
    """
    config = knowledge.config
    noise = _common_noise(seen.update) if knowledge.is_noised else 0.0
    bits = _BITS[str(config.compression.options.get("dtype", "fp32"))]
    exact = scale(rounding(seen.state, seen.update), local_steps(config) ** 0.5)
    values, deviations = {}, {}
    for name, update in seen.update.items():
        update = update.double()
        spread = (relative_noise / math.sqrt(update.numel())) * update.norm()
        error = exact[name].square() + noise**2 + spread**2
        if bits < 24:
            error = error + (update.abs() * 2.0 ** (1 - bits)).square() / 12
        error = (error + _dropped(update).square()).sqrt()
        values[name], deviations[name] = update, error
    reading = Reading(values, deviations)
    return _before_adam(reading, seen, knowledge)


def read_all(
    seen: Sequence[Seen], knowledge: Knowledge, relative_noise: float = 0.0
) -> list[Reading]:
    """Reads every round's."""
    return [read(one, knowledge, relative_noise) for one in seen]


def _dropped(update: torch.Tensor) -> torch.Tensor:
    """Returns the deviation of entries that a compressor left out or made equal.

    What is zero beside others was smaller than the smallest that was kept: uniform up
    to there. Where all that was kept has one magnitude, the true ones lie around it.
    """
    kept = update != 0
    if bool(kept.all()) or not bool(kept.any()):
        return torch.zeros_like(update)
    magnitudes = update[kept].abs()
    least, most = float(magnitudes.min()), float(magnitudes.max())
    if least > 0.999 * most:  # one magnitude: signs alone; the threshold lies below
        return torch.where(kept, 0.4 * most, 0.35 * most)
    return torch.where(kept, 0.0, least / math.sqrt(3))


def _common_noise(update: Tensors) -> float:
    """Returns the deviation of noise that all entries share: half of them lie within.

    Against noise that protects a record the signal of most entries is nothing.
    """
    return float(flatten(update).double().abs().median()) / 0.6745


def _before_adam(reading: Reading, seen: Seen, knowledge: Knowledge) -> Reading:
    """Undoes AdamW's first step, ``-rate * g / (|g| + epsilon)``: it keeps g's size.

    The step falls short of the rate by ``epsilon / |g|``, which single precision shows
    for all but the largest gradients: a sign is not all that travels. Several steps
    are read as one of their mean.
    """
    section = knowledge.config.training
    if section.optimizer != "adamw":
        return reading
    steps = local_steps(knowledge.config)
    rate_of = _rate_of_each(knowledge, seen.server_round)
    values, deviations = {}, {}
    for name, update in reading.values.items():
        rate = rate_of[name] * steps
        shrunk = rate * section.weight_decay * seen.state[name].double()
        share = ((update + shrunk).abs() / rate).clamp(max=1 - 1e-7)
        values[name] = (update + shrunk).sign() * share / (1 - share)
        deviations[name] = reading.deviations[name] / rate / (1 - share) ** 2
    return Reading(values, deviations)


def local_steps(config: RunConfig) -> int:
    """Returns the local steps of a round, of a client with the nominal examples."""
    examples = config.nominal_units or 1
    a_pass = -(-examples // min(config.training.batch_size, examples))
    return max(1, round(config.training.local_epochs * a_pass))


def decay(config: RunConfig, server_round: int) -> float:
    """Returns the factor on the learning rates in a round."""
    is_linear = config.training.decay == "linear"
    return 1 - (server_round - 1) / config.run.rounds if is_linear else 1.0


def rates(knowledge: Knowledge, server_round: int) -> list[dict[str, Any]]:
    """Returns the trained parameters with their learning rates, as optimisers want."""
    section, module = knowledge.config.training, knowledge.model.module
    factor = decay(knowledge.config, server_round)
    head = {id(p) for op in module.head_operations for p in op.module.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    head_rate = section.head_learning_rate or section.learning_rate
    return [
        {
            "params": [p for p in trained if id(p) not in head],
            "lr": factor * section.learning_rate,
        },
        {
            "params": [p for p in trained if id(p) in head],
            "lr": factor * head_rate,
        },
    ]


def _rate_of_each(knowledge: Knowledge, server_round: int) -> dict[str, float]:
    """Returns the learning rate of every trained parameter, by name."""
    groups = rates(knowledge, server_round)
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = knowledge.model.module.named_parameters()
    return {name: rate_of[id(p)] for name, p in named if p.requires_grad}
