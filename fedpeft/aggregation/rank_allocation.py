"""The server's half of AdaLoRA: which triplets live, from aggregated steps alone."""

import re
from dataclasses import dataclass

import torch

from fedpeft.aggregation.server_optimizers import ServerOptimizer
from fedpeft.errors import ConfigError
from fedpeft.interfaces import State
from fedpeft.tensors import Tensors, add, with_prefix, without_prefix, zeros_like

_PARTS = ("lora_A", "lora_E", "lora_B")


@dataclass(frozen=True)
class RankAllocation(ServerOptimizer):
    """Takes the aggregate as it is, and sets the E of unimportant triplets to zero.

    A triplet is one rank of one layer: a row of A, a value of E, a column of B. A value
    matters as much as the loss would change without it, about ``|value * step|``: here
    the step is the round's aggregate, in place of the source's gradient. That is
    smoothed over rounds and multiplied by how much it still varies. A triplet's
    importance is that of its E and the mean over its row and over its column. All
    layers compete for one budget, which falls from all triplets to `target_rank` a
    layer by the source's cubic schedule.

    **Guarantees**: reads nothing but aggregates and the state it follows from the first
    round, so it takes nothing from a privacy guarantee. From `final_round` on at most
    ``target_rank`` triplets a layer, on average, have an E that is not zero. A triplet
    that was cut may come back: clients go on to train its E, from zero.

    Attributes:
        target_rank: of a layer in the end, on average.
        warmup_rounds: rounds before the first triplet is cut.
        final_round: the round, counted from 1, from which the budget stays.
        smoothing: decay of both averages.

    Source: Zhang et al. (2023), AdaLoRA, sections 3.2 and 3.3, equations 8 to 11.
    """

    target_rank: int
    final_round: int
    warmup_rounds: int = 0
    smoothing: float = 0.85

    def __post_init__(self) -> None:
        if self.target_rank < 1:
            raise ValueError(f"Expected target_rank >= 1, got {self.target_rank}.")
        if not 0 <= self.warmup_rounds < self.final_round:
            raise ValueError(
                f"Expected 0 <= warmup_rounds < final_round, got {self.warmup_rounds} "
                f"and {self.final_round}."
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"Expected 0 <= smoothing < 1, got {self.smoothing}.")

    def init(self, like: Tensors) -> State:
        """Keeps the triplets' values, which it follows from now on.

        Raises:
            ConfigError: if there are none.
        """
        names = [name for layer in _layers(like) for name in layer.values()]
        if not names:
            raise ConfigError(
                "[aggregation] server_optimizer: expected a method with triplets to "
                "allocate, got one without: choose [peft] name = 'adalora'."
            )
        values = {name: like[name].clone() for name in names}
        rounds = {"round": torch.zeros((), dtype=torch.int64)}
        return rounds | _joined(values, zeros_like(values), zeros_like(values))

    def apply(self, aggregate: Tensors, state: State) -> tuple[Tensors, State]:
        """Returns the aggregate; where a triplet is cut, what takes its E to zero."""
        now = state["round"] + 1
        values = without_prefix("value", state)
        smooth, doubt = {}, {}
        for name, value in values.items():
            change = (value * aggregate[name]).abs()
            smooth[name] = self._decayed(state[f"sensitivity.{name}"], change)
            spread = (change - smooth[name]).abs()
            doubt[name] = self._decayed(state[f"uncertainty.{name}"], spread)
        layers = _layers(values)
        importance = {name: smooth[name] * doubt[name] for name in values}
        scores = [_importance(layer, importance) for layer in layers]
        kept = _best(torch.cat(scores), self._budget(scores, int(now)))
        step = dict(aggregate)
        parts = torch.split(kept, [len(score) for score in scores])
        for layer, keep in zip(layers, parts, strict=True):
            name = layer["lora_E"]
            alive = keep.view_as(values[name])
            step[name] = aggregate[name].where(alive, -values[name])
        after = add(values, step)
        return step, {"round": now} | _joined(after, smooth, doubt)

    def _budget(self, scores: list[torch.Tensor], server_round: int) -> int:
        """Returns how many triplets may live in a round, counted from 1."""
        whole = sum(len(score) for score in scores)
        target = min(whole, self.target_rank * len(scores))
        span = self.final_round - self.warmup_rounds
        left = (self.final_round - server_round) / span
        return int(target + (whole - target) * min(1.0, max(0.0, left)) ** 3)

    def _decayed(self, before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        return self.smoothing * before + (1 - self.smoothing) * now


def _joined(values: Tensors, smooth: Tensors, doubt: Tensors) -> State:
    return (
        with_prefix("value", values)
        | with_prefix("sensitivity", smooth)
        | with_prefix("uncertainty", doubt)
    )


def _layers(tensors: Tensors) -> list[dict[str, str]]:
    """Returns the names of each layer's three tensors, by their parts, in order."""
    found = []
    for name in sorted(tensors):
        if re.search(r"\.lora_E(\.|$)", name):
            layer = {part: name.replace("lora_E", part) for part in _PARTS}
            if all(other in tensors for other in layer.values()):
                found.append(layer)
    return found


def _importance(layer: dict[str, str], values: Tensors) -> torch.Tensor:
    """Returns one number a triplet, shape ``(rank,)``."""
    down, middle, up = (values[layer[part]] for part in _PARTS)
    return middle.flatten() + down.mean(1) + up.mean(0)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Tells which are among the best; of equal ones the first."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept
