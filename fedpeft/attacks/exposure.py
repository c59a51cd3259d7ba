"""How exposed is a planted string? Its rank among all that could stand in its place.

Before training the auditor puts a random string, such as a number behind a fixed
phrase, among a client's records, and asks afterwards how likely the model finds it
beside the others of the same form. A rank of one among n is an exposure of ``log2 n``
bits: guessing in the model's order finds it at once.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.stats import skewnorm

from fedpeft.attacks._confidence import judged
from fedpeft.attacks.attack import Attack, Knowledge, Observation, Scores, Secret
from fedpeft.attacks.threats import ThreatModel
from fedpeft.tasks.causal_lm import CausalLanguageModelling
from fedpeft.tensors import add

_FEWEST = 50
"""Strings to which a distribution is fitted."""

_MOST_BITS = 1000.0
"""Beyond, a fitted tail is no number any more."""


@dataclass(frozen=True)
class Exposure(Attack[torch.Tensor]):
    """Ranks strings by their log-perplexity, the sum over their tokens.

    The metric ``exposure`` is at most ``log2`` of the number of strings asked about.
    ``exposure_extrapolated`` fits a skew normal to the log-perplexities of those that
    were not planted and is not so bounded, but an estimate; it is left out with fewer
    than 50 of them.

    Source: Carlini et al. (2019), The Secret Sharer, arXiv:1802.08232, sections 4.2
    and 4.4.
    """

    needs: ClassVar[ThreatModel] = ThreatModel("A", "final-model", "extract")
    metrics: ClassVar[dict[str, str]] = {
        "exposure": "bits",
        "exposure_extrapolated": "bits",
    }

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Wants a model that goes on with texts."""
        if not isinstance(knowledge.model.task, CausalLanguageModelling):
            return "the model does not go on with texts"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> torch.Tensor:
        """Returns the candidates' log-perplexities in nats, shape ``(candidates,)``.

        Under the released model; where that is not seen, under the client's own after
        the last round that is.

        Raises:
            ValueError: if there is nothing to ask about, or no model to ask.
        """
        candidates, final = observation.candidates, observation.final
        if candidates is None or (final is None and not observation.seen):
            raise ValueError(
                "Expected candidates and a model, got one or none of them."
            )
        if final is None:
            last = observation.seen[-1]
            final = add(last.state, last.update)
        return judged(observation.knowledge.model, final, candidates)[:, 0]

    def score(self, guess: torch.Tensor, secret: Secret) -> Scores:
        """One planted string a value.

        Raises:
            ValueError: unless some candidates are planted and others are not.
        """
        is_member = secret.is_member
        if is_member is None or not is_member.any() or is_member.all():
            raise ValueError(
                "Expected planted strings among others, got one kind only."
            )
        planted, others = guess[is_member], guess[~is_member]
        scores = {"exposure": _by_rank(planted, others)}
        if len(others) >= _FEWEST:
            scores["exposure_extrapolated"] = _extrapolated(planted, others)
        return scores

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Asks in a random order."""
        assert secret.is_member is not None
        return self.score(torch.rand(len(secret.is_member), generator=rng), secret)


def _by_rank(planted: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns ``log2 n - log2 rank`` of each planted string among all the others.

    Ties rank behind.

    >>> _by_rank(torch.tensor([0.5]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([2.], dtype=torch.float64)
    """
    ranks = 1 + (others <= planted[:, None]).sum(1).double()
    return math.log2(1 + len(others)) - ranks.log2()


def _extrapolated(planted: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns minus ``log2`` of the fitted share of strings that are as likely."""
    shape = skewnorm.fit(others.double().numpy(), method="MM")
    logs = skewnorm.logcdf(planted.double().numpy(), *shape)
    return (-torch.from_numpy(logs) / math.log(2)).clamp(max=_MOST_BITS)
