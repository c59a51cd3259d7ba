"""Was a record in the training data of a released model? By models that are alike.

The adversary holds public records and trains models of its own on halves of them, as
the federation trains: adapters alone, so that each is cheap. None of them has seen the
candidate, so they tell how sure a model is of it that never saw it.

*rmia* asks against how many public records z the candidate wins: whose probability rose
more from the shadows to the model? *lira* asks how far the model's log odds lie above
the shadows', in standard deviations.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedpeft.attacks._confidence import log_odds, probabilities
from fedpeft.attacks._membership import MEMBERSHIP, coin_scores, membership_scores
from fedpeft.attacks.attack import Attack, Knowledge, Observation, Scores, Secret
from fedpeft.attacks.threats import ThreatModel
from fedpeft.data import Encoded
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class ShadowMembership(Attack[torch.Tensor]):
    """One score a candidate, larger for a member.

    Attributes:
        method: ``rmia`` or ``lira``, both offline: no shadow is trained on a candidate.
        gamma: by how much a candidate must win against a public record; at least 1.
        slope: what is assumed of a model that has seen a record: its probability is
            ``slope * p + 1 - slope`` where shadows that have not give p.
        population: public records that candidates are compared with, at most.

    Source: Zarifzadeh et al. (2024), RMIA, arXiv:2312.03262, sections 3.1 and 3.3 with
    appendix B.2.2; Carlini et al. (2022), LiRA, section VI-A, with one deviation for
    all records, as they advise for few shadows.
    """

    method: Literal["rmia", "lira"] = "rmia"
    gamma: float = 1.0
    slope: float = 0.3
    population: int = 1000

    needs: ClassVar[ThreatModel] = ThreatModel("D", "final-model", "membership")
    metrics: ClassVar[dict[str, str]] = MEMBERSHIP

    def __post_init__(self) -> None:
        if not self.gamma >= 1:
            raise ValueError(f"Expected gamma >= 1, got {self.gamma}.")
        if not 0 <= self.slope <= 1:
            raise ValueError(f"Expected slope in 0..1, got {self.slope}.")

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Wants models to compare with, and what they were trained on."""
        if len(knowledge.references) < 2 or knowledge.reference_members is None:
            return "there are no reference models"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> torch.Tensor:
        """Returns the scores, shape ``(candidates,)``, in doubles.

        Raises:
            ValueError: if there is nobody to ask about, or no model.
        """
        knowledge, final = observation.knowledge, observation.final
        candidates = observation.candidates
        if candidates is None or final is None:
            raise ValueError("Expected candidates and a released model, got one only.")
        model = knowledge.model
        mine = log_odds(model, final, candidates)
        shadows = _shadow_odds(knowledge, candidates)
        stranger = _strangers(knowledge, candidates)
        if self.method == "lira":
            return _deviations(mine, shadows, stranger)
        public = _some(knowledge, self.population)
        theirs = log_odds(model, final, public)
        ratios = self._ratio(mine, shadows, stranger)
        others = self._ratio(
            theirs, _shadow_odds(knowledge, public), _strangers(knowledge, public)
        )
        wins: torch.Tensor = ratios[:, None] >= math.log(self.gamma) + others
        return wins.double().mean(1)

    def _ratio(
        self, odds: torch.Tensor, shadows: torch.Tensor, stranger: torch.Tensor
    ) -> torch.Tensor:
        """Returns ``log p(x | model) / p(x)``, shape ``(records,)``."""
        unseen = _mean_over(probabilities(shadows), stranger)
        prior = ((1 + self.slope) * unseen + 1 - self.slope) / 2
        return probabilities(odds).clamp(min=1e-300).log() - prior.log()

    def score(self, guess: torch.Tensor, secret: Secret) -> Scores:
        """See :func:`membership_scores`."""
        return membership_scores(guess, secret)

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Throws coins."""
        return coin_scores(secret, rng)


def _some(knowledge: Knowledge, most: int) -> Encoded:
    assert knowledge.surrogate is not None
    return knowledge.surrogate.subset(range(min(most, len(knowledge.surrogate))))


def _shadow_odds(knowledge: Knowledge, examples: Encoded) -> torch.Tensor:
    """Returns the log odds of every shadow, shape ``(shadows, records)``."""
    states: tuple[Tensors, ...] = knowledge.references
    return torch.stack([log_odds(knowledge.model, s, examples) for s in states])


def _strangers(knowledge: Knowledge, examples: Encoded) -> torch.Tensor:
    """Returns which shadow has not seen which record: ``(shadows, records)``, bool."""
    public, members = knowledge.surrogate, knowledge.reference_members
    assert public is not None
    assert members is not None
    place = {_input_of(public, index): index for index in range(len(public))}
    found = [place.get(_input_of(examples, index)) for index in range(len(examples))]
    unseen = torch.ones(len(members), len(examples), dtype=torch.bool)
    for column, index in enumerate(found):
        if index is not None:
            unseen[:, column] = ~members[:, index]
    return unseen


def _input_of(examples: Encoded, index: int) -> bytes:
    return examples.inputs[index].numpy().tobytes()


def _mean_over(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Returns each column's mean over the chosen rows; over all where none is."""
    chosen = chosen | ~chosen.any(0)
    return (values * chosen).sum(0) / chosen.sum(0)


def _deviations(
    mine: torch.Tensor, shadows: torch.Tensor, stranger: torch.Tensor
) -> torch.Tensor:
    """Returns how far the model's log odds lie above the shadows', in deviations."""
    centre = _mean_over(shadows, stranger)
    spread = _mean_over((shadows - centre).square(), stranger).mean().sqrt()
    return (mine - centre) / spread.clamp(min=1e-12)
