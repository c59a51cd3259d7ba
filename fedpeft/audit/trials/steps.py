"""Trials of one release: every pair, many times, through the real path."""

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedpeft.audit.canaries import spread_direction
from fedpeft.audit.results import DpTrial
from fedpeft.audit.trials.deciding import Scores, decide_pair
from fedpeft.audit.trials.mechanisms import (
    LocalSteps,
    Mechanism,
    ServerRounds,
    randomness,
)
from fedpeft.audit.trials.pairs import Pair, pairs, physical_batch
from fedpeft.config import RunConfig
from fedpeft.privacy import Plan

_AT_ONCE = 25
"""Releases of one call: a local training of so many steps, seen between any two."""

_LEAST_CALLS = 8
_MOST_CALLS = 800


def step_trials(
    config: RunConfig,
    plan: Plan,
    sizes: dict[str, int],
    *,
    seconds: float,
    seed: int,
    alpha: float,
) -> list[DpTrial]:
    """Runs all trials of a plan's releases, each equally often.

    How often depends on the clock and on nothing else; no score is looked at before the
    last one is there.

    Args:
        config: of the run.
        plan: of the run.
        sizes: of the tensors of the canary model.
        seconds: for all trials together; 200 releases of each side there are anyway.
        seed: of what is not secret anyway.
        alpha: for each trial.

    Raises:
        ValueError: if a client fails with the canary and without: that tells nothing.
    """
    end = time.monotonic() + seconds
    found = pairs(plan, spread_direction(sizes))
    trials = [
        _Trial(config, plan, pair, _mechanism(config, plan, sizes, pair), seed)
        for pair in found
    ]
    for call in range(_MOST_CALLS):
        if call >= _LEAST_CALLS and time.monotonic() > end:
            break
        for trial in trials:
            trial.run(call)
    return [trial.decide(alpha) for trial in trials]


def num_step_trials(plan: Plan) -> int:
    """Returns how many trials there are."""
    return len(pairs(plan, torch.ones(1)))


def _mechanism(
    config: RunConfig, plan: Plan, sizes: dict[str, int], pair: Pair
) -> Mechanism:
    if not plan.is_dp_sgd:
        return ServerRounds(plan, sizes, _AT_ONCE)
    of_pair = replace(
        plan,
        noise_multiplier=pair.claim(plan).noise_multiplier,
        sampling_rate=pair.sampling_rate,
        local_steps=_AT_ONCE,
    )
    return LocalSteps.of(config, of_pair, sizes, physical_batch(plan))


@dataclass(frozen=True, eq=False)
class _Trial:
    """One pair and what its releases scored so far, without the canary and with it."""

    config: RunConfig
    plan: Plan
    pair: Pair
    mechanism: Mechanism
    seed: int
    scores: dict[bool, list[Scores | None]] = field(
        default_factory=lambda: {False: [], True: []}
    )

    def run(self, call: int) -> None:
        """Has both data sets answered once."""
        for side, scores in self.scores.items():
            scores.append(self._answer(side, call))

    def _answer(self, side: bool, call: int) -> Scores | None:
        """Returns a score a release; None where the client fails: that is seen, too."""
        source = randomness(self.config, self.seed, self.pair.trial, int(side), call)
        try:
            sums = self.mechanism.sums(*self.pair.rows(side), source)
        except Exception:
            return None
        scores: Scores = self.pair.scores(sums, self.plan).numpy()
        return scores

    def decide(self, alpha: float) -> DpTrial:
        """Judges all of it."""
        given = [*self.scores[False], *self.scores[True]]
        if all(scores is None for scores in given):
            raise ValueError(
                "Expected releases of canaries, got an error with and without them: "
                "run `fedpeft doctor`."
            )
        failed = np.full(_AT_ONCE, self.pair.failure_score)
        without, with_canary = (
            np.concatenate([failed if part is None else part for part in scores])
            for scores in self.scores.values()
        )
        return decide_pair(
            self.pair.trial,
            self.pair.looks_for,
            (with_canary, without),
            threshold=self.pair.threshold(self.plan),
            claim=self.pair.claim(self.plan),
            delta=self.plan.target_delta,
            alpha=alpha,
        )
