"""What an attack is: from an observation to a guess, judged against a secret.

An attack sees exactly what its threat model grants. Its guess is scored by somebody
else, who holds the secret, and beside two controls: a *baseline*, which guesses without
any observation, and the *prior-only control*, the same attack without the client, such
as on another one's update. What exceeds the control is what the client gave away.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, TypeVar

import torch

from fedpeft.attacks.threats import ThreatModel
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.model import TaskModel
from fedpeft.tensors import Tensors

Guess = TypeVar("Guess")

Scores = dict[str, torch.Tensor]
"""Metric -> one value a record, shape ``(records,)``, in doubles."""

View = str | torch.Tensor
"""A record to look at: a text, or pixels in 0..1, ``(channels, height, width)``."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One client's part in one round, as it was on the wire.

    Attributes:
        server_round: from 1.
        state: what the client started from, as the server sent it.
        update: what it answered, decoded: local minus global. Where only the aggregate
            is seen, how the server's state changed.
        num_examples: how many it says it has; None where it does not tell.
        in_vain: whether the round was done again without it: no model has it in it.
    """

    server_round: int
    state: Tensors
    update: Tensors
    num_examples: int | None = None
    in_vain: bool = False


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What is public, and what the adversary has at home.

    Attributes:
        model: backbone, adapters and head, as every client builds them. An attack may
            load other trainable states into it.
        config: of the run; an adversary below C makes no use of its training section.
        surrogate: public examples of the same kind, for an adversary of D and above.
        references: trainable states of models trained like the real one on halves of
            `surrogate`; row k of `reference_members` says on which of them.
        reference_members: shape ``(len(references), len(surrogate))``, bool.
        sees_aggregates: whether what is seen comes from behind the server's rule.
    """

    model: TaskModel
    config: RunConfig
    surrogate: Encoded | None = None
    references: tuple[Tensors, ...] = ()
    reference_members: torch.Tensor | None = None
    sees_aggregates: bool = False

    @property
    def is_noised(self) -> bool:
        """Whether what is seen carries the noise of privacy, the server's included."""
        by_server = self.config.privacy.unit == "client" and self.sees_aggregates
        return self.config.is_dp_sgd or by_server


@dataclass(frozen=True, eq=False)
class Observation:
    """Everything that an attack is given.

    Attributes:
        knowledge: what does not come from this client.
        seen: one client's rounds, in order; empty where only the model is seen.
        others: those of other clients in the same rounds.
        broadcast: round -> the state that it started from, as all participants got it;
            after the last round seen the next one's, where that is known.
        final: the released model's trainable state.
        candidates: records of which the adversary asks whether they took part.
    """

    knowledge: Knowledge
    seen: tuple[Seen, ...] = ()
    others: tuple[tuple[Seen, ...], ...] = ()
    broadcast: Mapping[int, Tensors] = field(default_factory=dict)
    final: Tensors | None = None
    candidates: Encoded | None = None


@dataclass(frozen=True, eq=False)
class Secret:
    """What the auditor alone knows.

    Attributes:
        examples: the client's records that took part in the rounds seen.
        decoys: records of the same kind that no client holds.
        is_member: of the observation's candidates, which took part, shape ``(c,)``.
    """

    examples: Encoded
    decoys: Encoded | None = None
    is_member: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """One victim: what is seen of it, and what is true.

    Attributes:
        observation: that is attacked.
        secret: that a guess is judged against.
        control: what the prior-only control sees; None where that is another victim's
            observation.
    """

    observation: Observation
    secret: Secret
    control: Observation | None = None


class Attack(ABC, Generic[Guess]):
    """One way to attack. Variants are frozen dataclasses of hyperparameters.

    Attributes:
        needs: the least that an adversary must be granted.
        metrics: name of each score -> its unit: ``share`` (0 to 1), ``dB``, ``bits``,
            or ``""`` (a likeness, -1 to 1). The first one is the attack's headline.
            Larger is worse for the client, always.
        undoes_optimizer: whether it reckons back from AdamW's update to the gradient,
            with learning rate and steps: then an adversary must know these.
    """

    needs: ClassVar[ThreatModel]
    metrics: ClassVar[dict[str, str]]
    undoes_optimizer: ClassVar[bool] = False

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Says why the attack cannot be tried on such a run; None if it can.

        One half sentence, such as "no low-rank factor reads the first block's input".
        """
        return None

    def unusable(self, observation: Observation) -> str | None:
        """Says why what was seen of a victim does not suffice; None if it does.

        Neither for the attack nor, with another victim's updates, for its prior-only
        control. One half sentence, as of :meth:`misfit`.
        """
        return None

    def craft(self, knowledge: Knowledge, rng: torch.Generator) -> Tensors | None:
        """Returns what an active adversary sends in place of the trainable state."""
        return None

    @abstractmethod
    def run(self, observation: Observation, rng: torch.Generator) -> Guess:
        """Returns what the adversary makes of it; knows no secret."""

    @abstractmethod
    def score(self, guess: Guess, secret: Secret) -> Scores:
        """Compares a guess with what is true; one value a record and metric."""

    @abstractmethod
    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Scores the best trivial guess, which uses no update and no secret.

        Such as the commonest token, the mean image, a coin.
        """

    def shown(self, guess: Guess, case: Case) -> tuple[View, View] | None:
        """Returns the case's first record, and what a guess makes of it, to look at.

        None where there is nothing to see: a guess may be a number.
        """
        return None


def with_updates_of(mine: Observation, other: Observation) -> Observation:
    """Returns an observation that asks what `mine` asks, of another client's rounds.

    What the prior-only control runs on. `mine` is not among the others there: whoever
    is asked about must not be part of what others look like.
    """
    others = tuple(seen for seen in other.others if seen is not mine.seen)
    return replace(other, others=others, candidates=mine.candidates)


def neighbours(cases: Sequence[Case]) -> list[Case]:
    """Returns for each case the one whose updates its prior-only control sees.

    Raises:
        ValueError: if there is only one: a control needs another client.
    """
    if len(cases) < 2:
        raise ValueError(
            f"Expected at least two victims, got {len(cases)}: the prior-only control "
            "is the attack on another one's update."
        )
    return [*cases[1:], cases[0]]
