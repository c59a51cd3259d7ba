"""Many canaries in one run: each in or out by a coin, all rounds through a release.

Every client of the trial holds nothing but canaries in random directions. It answers
all rounds of the plan as a client does, ledger and outbox included, in a directory of
its own that is deleted afterwards. A canary's score is the inner product of all updates
so far with its direction. One run tests as many canaries as there are, and after every
round a lower bound stands beside the accountant's upper one.

Source: Steinke, Nasr & Jagielski (2023), https://arxiv.org/abs/2305.08846; gradient
canaries: Nasr et al. (2023), https://arxiv.org/abs/2302.07956.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedpeft.audit.results import Check, DpTrial
from fedpeft.audit.trials.answers import CanaryClient
from fedpeft.audit.trials.deciding import decide_run
from fedpeft.audit.trials.mechanisms import LocalSteps, ServerRounds, randomness
from fedpeft.config import RunConfig
from fedpeft.privacy import Plan, poisson_batch
from fedpeft.privacy.draws import Draws
from fedpeft.seeds import generator
from fedpeft.tensors import Tensors, flatten, unflatten

CANARIES = 400
"""A client; a fair coin keeps about half of them."""

CLIENTS = 3

_LENGTH = 10.0
"""Of a canary, in clipping norms: all of them are clipped."""

_REPORTED = 6
"""Rounds of a client: each costs seconds of an accountant."""


@dataclass(frozen=True, eq=False)
class Coins:
    """A client's canaries and their coins, all from a seed that the report names.

    Attributes:
        directions: unit vectors, shape ``(canaries, total)``.
        included: shape ``(canaries,)``, bool.
    """

    directions: torch.Tensor
    included: torch.Tensor

    @classmethod
    def flip(cls, seed: int, client: int, canaries: int, total: int) -> "Coins":
        """Draws them; the coins are independent of the directions."""
        rows = torch.randn(canaries, total, generator=generator(seed, "rows", client))
        coins = torch.rand(canaries, generator=generator(seed, "coins", client)) < 0.5
        return cls(rows / rows.norm(dim=1, keepdim=True), coins)


def whole_runs(
    config: RunConfig,
    plan: Plan,
    sizes: dict[str, int],
    *,
    seconds: float,
    seed: int,
    alpha: float,
) -> tuple[list[DpTrial], list[Check]]:
    """Returns a trial a client and round, and what the ledgers say.

    Clients that the time does not allow are left out; the first is always there, with
    as many rounds as fit.

    Args:
        config: of the run.
        plan: of the run, of DP-SGD.
        sizes: of the tensors of the canary model.
        seconds: for all of it.
        seed: of canaries and coins.
        alpha: for each client and round.
    """
    end = time.monotonic() + seconds

    def is_over() -> bool:
        return time.monotonic() > end

    trials: list[DpTrial] = []
    checks: list[Check] = []
    for client in range(CLIENTS):
        if client and is_over():
            break
        coins = Coins.flip(seed, client, CANARIES, sum(sizes.values()))
        with tempfile.TemporaryDirectory() as state:
            mine = CanaryClient(config, plan, Path(state), client, seed)
            try:
                scores = _scores(mine, coins, sizes, is_over)
            except ValueError as error:  # the release itself found something wrong
                return trials, [*checks, mine.failed(error)]
            # A client that the time cut short has no budget to reach: one says so.
            found = mine.checks(len(scores))
            checks += [c for c in found if not client or c.status != "unknown"]
        trials += run_trials(
            "whole run",
            scores,
            coins.included,
            plan,
            seed=seed,
            client=client,
            alpha=alpha,
        )
    return trials, checks


def server_run(
    config: RunConfig,
    plan: Plan,
    sizes: dict[str, int],
    *,
    seconds: float,
    seed: int,
    alpha: float,
) -> list[DpTrial]:
    """Returns a trial a round of a run whose clients are the canaries themselves.

    Each that is in takes part as often as the plan allows: in every round, or, where
    cohorts are Poisson, drawn like them.

    Args:
        config: of the run.
        plan: of the run, of unit ``client``, with independent noise.
        sizes: of the tensors of an update.
        seconds: no round begins later, but for the first.
        seed: of canaries and coins.
        alpha: for each trial.
    """
    end = time.monotonic() + seconds
    coins = Coins.flip(seed, 0, CANARIES, sum(sizes.values()))
    rows = _LENGTH * coins.directions[coins.included]
    mechanism = ServerRounds(plan, sizes, rounds=1)
    total = torch.zeros(CANARIES)
    scores: list[torch.Tensor] = []
    for server_round in range(1, plan.max_participations + 1):
        if scores and time.monotonic() > end:
            break
        source = randomness(config, seed, "server", server_round)
        cohort = poisson_batch(len(rows), plan.sampling_rate, source)
        update = mechanism.sums(rows[cohort], cohort, source)[0]
        total = total + coins.directions @ update
        scores.append(total)
    return run_trials(
        "whole run", scores, coins.included, plan, seed=seed, client=None, alpha=alpha
    )


def run_trials(
    trial: str,
    scores: Sequence[torch.Tensor],
    included: torch.Tensor,
    plan: Plan,
    *,
    seed: int,
    client: int | None,
    alpha: float,
) -> list[DpTrial]:
    """Judges what a run tells, after some of its rounds.

    Args:
        trial: its name.
        scores: of all canaries after each round, shape ``(canaries,)``.
        included: which of them were in, bool.
        plan: of the run.
        seed: of the coins, for the report.
        client: whose answers they are; None where the canaries are clients.
        alpha: for each trial.
    """
    detail = (
        f"{len(included)} canaries, each in with probability 1/2 by seed {seed}; "
        f"{int(included.sum())} were in."
    )
    return [
        decide_run(
            trial,
            detail,
            scores[server_round - 1].double().numpy(),
            included.numpy(),
            client=client,
            server_round=server_round,
            claim=plan.composition(server_round),
            delta=plan.target_delta,
            alpha=alpha,
        )
        for server_round in reported_rounds(len(scores))
    ]


def num_run_trials(plan: Plan) -> int:
    """Returns how many trials there are at most, one client of samples included."""
    return (CLIENTS + 1) * min(_REPORTED, plan.max_participations)


def reported_rounds(rounds: int) -> list[int]:
    """Returns the rounds after which bounds are worked out; the last is one of them.

    >>> reported_rounds(3), reported_rounds(60)
    ([1, 2, 3], [10, 20, 30, 40, 50, 60])
    """
    parts = min(_REPORTED, rounds)
    return [rounds * part // parts for part in range(1, parts + 1)]


def _scores(
    mine: CanaryClient, coins: Coins, sizes: dict[str, int], is_over: Callable[[], bool]
) -> list[torch.Tensor]:
    """Answers round after round; returns all canaries' scores after each."""
    section, plan = mine.config.training, mine.plan
    physical_batch = max(section.max_physical_batch, plan.max_examples or 1)
    mechanism = LocalSteps.of(mine.config, plan, sizes, physical_batch)
    rows = _LENGTH * coins.directions[coins.included]
    like = {name: torch.zeros(size) for name, size in sizes.items()}

    def train(draws: Draws) -> Tensors:
        sums = mechanism.steps(rows, list(range(len(rows))), draws)
        return unflatten(sums.sum(0), like)

    total = torch.zeros(len(coins.directions))
    scores: list[torch.Tensor] = []
    for server_round in range(1, plan.max_participations + 1):
        if scores and is_over():
            break
        total = total + coins.directions @ flatten(mine.answer(server_round, train))
        scores.append(total)
    return scores
