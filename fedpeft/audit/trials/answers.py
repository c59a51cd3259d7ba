"""Answers of a client that holds nothing but canaries, given as a client gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fedpeft.audit.results import Check
from fedpeft.audit.trials.checks import budget_check, ledger_checks
from fedpeft.audit.trials.mechanisms import randomness
from fedpeft.compression import Dense
from fedpeft.config import RunConfig
from fedpeft.interfaces import Payload
from fedpeft.privacy import Memory, Plan, Question, open_release
from fedpeft.privacy.draws import Draws
from fedpeft.privacy.ledger import ledger_as_it_stands
from fedpeft.tensors import Tensors

_RUN = "canaries"


@dataclass(frozen=True, eq=False)
class CanaryClient:
    """One client, with a ledger and an outbox of its own.

    Attributes:
        config: of the run.
        plan: of the run.
        state: its own directory.
        client: its index.
        seed: for what is not secret.
    """

    config: RunConfig
    plan: Plan
    state: Path
    client: int
    seed: int

    @property
    def source(self) -> str:
        """The name of its ledger."""
        return f"canaries-{self.client}"

    def answer(self, server_round: int, train: Callable[[Draws], Tensors]) -> Tensors:
        """Trains, commits and returns what a server would read.

        Raises:
            ValueError: if the release found that batches or noise were not the plan's.
        """
        question = Question(_RUN, server_round, f"request {server_round}")
        with open_release(
            self.state,
            self.source,
            plan=self.plan,
            randomness=randomness(self.config, self.seed, self.client, server_round),
            backbone=_RUN,
        ) as release:
            release.authorise(question)
            update = train(release.draws)
            payload = Dense().compress(update, torch.Generator())
            answer = release.commit(question, payload.to_bytes(), Memory())
        return Dense().decompress(Payload.from_bytes(answer.payload), update)

    def checks(self, answers: int) -> list[Check]:
        """Looks at the ledger after so many answers, and at what it still allows."""
        ledger = ledger_as_it_stands(self.state, self.source)
        delta = self.plan.target_delta
        noise = randomness(self.config, self.seed, self.client, "another run")
        return [
            *ledger_checks(ledger, answers=answers, delta=delta),
            budget_check(self.state, self.source, self.plan, noise),
        ]

    def failed(self, error: ValueError) -> Check:
        """Says that it could not answer; then nothing was released, either."""
        return Check(f"{self.source}: a client answers", "failed", str(error))
