"""Successive halving, and the choices that nothing beats.

All candidates train a little; the better half trains twice as long, from the start, and
so on: noise that is calibrated for a number of steps does not fit more of them.

Source: Jamieson & Talwalkar (2016), Non-stochastic Best Arm Identification and
Hyperparameter Optimization, https://arxiv.org/abs/1502.07943, figure 3: the inner loop
of Hyperband, Li et al. (2018), https://arxiv.org/abs/1603.06560. What is asked of it is
AutoPEFT's question, Zhou et al. (2024), https://arxiv.org/abs/2301.12132.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedpeft.search.candidates import Candidate


@dataclass(frozen=True)
class Trial:
    """One candidate's training and what came of it.

    Attributes:
        candidate: what was trained.
        rung: from 1.
        steps: local steps, each of one noised batch where there is privacy.
        epsilon: for which the noise of these steps was calibrated; None without.
        value: of the task's metric, judged on public data; None if it failed.
        loss: mean over the same examples; it decides between equal values, since after
            a few steps most candidates still name the commonest class.
        bytes_up: the payload of its update; 0 if it failed.
        trainable_parameters: values that train.
        step_seconds: wall time of a step; None where that would tell of private data.
        failure: why there is no value; empty if there is one.
    """

    candidate: Candidate
    rung: int
    steps: int
    epsilon: float | None
    value: float | None
    bytes_up: int
    trainable_parameters: int
    loss: float | None = None
    step_seconds: float | None = None
    failure: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns everything, the candidate as a table."""
        candidate = self.candidate
        chosen = {"peft": candidate.table, "learning_rate": candidate.learning_rate}
        return chosen | {k: v for k, v in vars(self).items() if k != "candidate"}


TrainFn: TypeAlias = Callable[[Candidate, int, int], Trial]
"""``train(candidate, rung, steps)``."""


def rungs(num_candidates: int, steps: int) -> list[tuple[int, int]]:
    """Returns how many are trained, and for how many steps, rung by rung.

    >>> rungs(10, steps=4)
    [(10, 4), (5, 8), (3, 16), (2, 32)]
    """
    sizes = [(num_candidates, steps)]
    while num_candidates > 2:
        num_candidates, steps = math.ceil(num_candidates / 2), 2 * steps
        sizes.append((num_candidates, steps))
    return sizes


def halving(
    candidates: Sequence[Candidate], steps: int, train: TrainFn, *, is_loss: bool
) -> Iterator[Trial]:
    """Yields every trial as soon as it is done, rung by rung.

    A trial that failed does not survive; of equal ones the smaller loss does.

    Args:
        candidates: of the first rung.
        steps: in the first rung; they double from rung to rung.
        train: trains one candidate, from the start.
        is_loss: whether a smaller value is a better one.
    """
    rung = 1
    while candidates:
        trials = []
        for candidate in candidates:
            trials.append(train(candidate, rung, steps))
            yield trials[-1]
        if len(candidates) <= 2:
            return
        best = best_first(trials, is_loss=is_loss)[: math.ceil(len(candidates) / 2)]
        candidates = [trial.candidate for trial in best]
        rung, steps = rung + 1, 2 * steps


def best_first(trials: Sequence[Trial], *, is_loss: bool) -> list[Trial]:
    """Returns the trials that have a value, in its order, then in that of the loss."""
    done = [trial for trial in trials if trial.value is not None]
    return sorted(done, key=lambda t: (_cost(t, is_loss), t.loss or 0.0))


def front(trials: Sequence[Trial], *, is_loss: bool) -> list[Trial]:
    """Returns the choices that none beats in metric, bytes and epsilon together.

    A ``[peft]`` table stands at each epsilon for what its longest training gave at its
    best learning rate, and sends what its largest payload took: a few bytes more or
    less are an accident of the values. By bytes, then by epsilon.
    """
    done = best_first(trials, is_loss=is_loss)
    largest: dict[str, int] = {}
    longest: dict[tuple[str, float | None], Trial] = {}
    for trial in done:
        label = trial.candidate.label
        largest[label] = max(largest.get(label, 0), trial.bytes_up)
        known = longest.setdefault((label, trial.epsilon), trial)
        if trial.steps > known.steps:
            longest[label, trial.epsilon] = trial
    contenders = list(longest.values())
    costs = [
        (
            largest[trial.candidate.label],
            math.inf if trial.epsilon is None else trial.epsilon,
            _cost(trial, is_loss),
        )
        for trial in contenders
    ]
    places = sorted(pareto_front(costs), key=lambda place: costs[place])
    return [contenders[place] for place in places]


def pareto_front(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """Returns the places of the rows that no other row dominates.

    A row dominates another if it is nowhere larger and somewhere smaller.

    >>> pareto_front([(1, 9), (2, 5), (3, 5), (4, 1)])
    [0, 1, 3]
    """

    def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [
        place
        for place, row in enumerate(costs)
        if not any(dominates(other, row) for other in costs)
    ]


def _cost(trial: Trial, is_loss: bool) -> float:
    value = math.inf if trial.value is None else trial.value
    return value if is_loss or trial.value is None else -value
