"""A server that sends bins in place of an adapter: tokens fall into them one by one.

The rows of an adapter's first matrix are all made the same direction, its biases minus
the quantiles of what tokens measure along it. A row then answers to the tokens above
its threshold alone, and two neighbouring rows differ in their gradients by the tokens
between both. Where there is one such token, the difference of the rows divided by that
of the biases *is* the token's input, whatever else is in the batch.

All of it is in the trainable state: the backbone is the one that clients verify, and no
layer of it has to be made an identity. So what comes out is the input of the adapter,
which has been through attention. Public records that went through the same state tell
which token, and which record, it was.

Nothing like it can be made of LoRA: its factors are linear and have no bias, so that
every row sums over all tokens. What a server can do there is to send B other than zero,
so that the first round tells as much as a later one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch.nn import functional as F

from fedpeft.attacks._bins import (
    caught_in_bins,
    close,
    make_bins,
    modules_below,
    normal,
    places_of_bins,
)
from fedpeft.attacks._inputs import Rows, kept_inputs
from fedpeft.attacks._text_scores import words_of
from fedpeft.attacks.attack import (
    Attack,
    Case,
    Knowledge,
    Observation,
    Scores,
    Secret,
    View,
)
from fedpeft.attacks.threats import ThreatModel
from fedpeft.data import Encoded
from fedpeft.model import TaskModel, shared_state
from fedpeft.tasks import CausalLanguageModelling, TextClassification
from fedpeft.tensors import Tensors


@dataclass(frozen=True, eq=False)
class Caught:
    """What a crafted round gave up.

    Attributes:
        model: through which records are compared with it.
        state: that was sent.
        places: the adapters that were made into bins.
        vectors: inputs of each place, shape ``(n, width)`` each.
        tokens: guesses at what is among them; None for images.
        usual: tokens that every record has, which say nothing.
    """

    model: TaskModel
    state: Tensors
    places: tuple[str, ...]
    vectors: tuple[torch.Tensor, ...]
    tokens: frozenset[int] | None
    usual: frozenset[int]

    def distances(self, examples: Encoded) -> torch.Tensor:
        """Returns how far each record is from what was caught, shape ``(records,)``.

        The mean over the vectors of the relative distance to the record's nearest
        token, each at most 1.
        """
        rows = kept_inputs(self.model, self.state, modules_below(self.places), examples)
        return torch.tensor([self._distance(row) for row in rows]).double()

    def _distance(self, row: Sequence[torch.Tensor]) -> float:
        parts = [
            _nearest(vectors, tokens)[0].clamp(max=1)
            for vectors, tokens in zip(self.vectors, row, strict=True)
        ]
        together = torch.cat(parts)
        return float(together.mean()) if len(together) else 1.0


@dataclass(frozen=True)
class MaliciousAdapter(Attack[Caught]):
    """Bins made of a bottleneck adapter, by the trainable state alone.

    Attributes:
        depth: adapters that are made into bins, from the lowest; the others do nothing.
        sharpness: of a threshold: what lies a bin's width above it measures so much.
        strength: norm of the column that carries a bin's output on. The larger, the
            more of the update survives single precision, and the more the bins disturb
            what is above them.
        head_norm: of the two directions between which the head then decides.
        surrogate: public records that set the thresholds and name the tokens.
        tolerance: relative distance up to which a token is named.

    Source: the bins are those of Fowl et al. (2022), Robbing the Fed, section 4; in
    adapters Liu et al. (2025), PEFTLeak, arXiv:2506.04453, which also replaces the
    backbone. That an intact backbone does not prevent it is measured here.
    """

    depth: int = 4
    sharpness: float = 8.0
    strength: float = 0.3
    head_norm: float = 4.0
    surrogate: int = 1000
    tolerance: float = 0.3

    needs: ClassVar[ThreatModel] = ThreatModel("G", "update", "reconstruct")
    metrics: ClassVar[dict[str, str]] = {
        "identification_top1": "share",
        "token_top1": "share",
    }

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Wants adapters with thresholds, and public records to set them by."""
        if not places_of_bins(shared_state(knowledge.model)):
            return "no adapter has a bias before its nonlinearity, to be a threshold"
        if not knowledge.surrogate:
            return "there are no public records to set thresholds by"
        return None

    def craft(self, knowledge: Knowledge, rng: torch.Generator) -> Tensors | None:
        """Returns the bins; None where the attack does not fit."""
        if self.misfit(knowledge):
            return None
        state = {name: t.clone() for name, t in shared_state(knowledge.model).items()}
        for place in places_of_bins(state):
            close(state, place)
        places = places_of_bins(state)[: self.depth]
        rows = self._public(knowledge, state)
        for number, place in enumerate(places):
            tokens = torch.cat([row[number] for row in rows])
            make_bins(
                state,
                place,
                tokens,
                rng,
                sharpness=self.sharpness,
                strength=self.strength,
            )
        if "head.weight" in state:
            labels, features = state["head.weight"].shape
            axis = F.normalize(normal(features, rng), dim=0)
            signs = (-1.0) ** torch.arange(labels)
            state["head.weight"] = self.head_norm * signs[:, None] * axis
        return state

    def run(self, observation: Observation, rng: torch.Generator) -> Caught:
        """Divides differences of rows by those of biases, and names tokens."""
        knowledge, seen = observation.knowledge, observation.seen[-1]
        places = tuple(places_of_bins(seen.state)[: self.depth])
        vectors = tuple(caught_in_bins(place, seen) for place in places)
        tokens, usual = None, frozenset[int]()
        if _are_texts(knowledge.surrogate):
            known = self._public(knowledge, seen.state)
            usual = _usual(knowledge.surrogate)
            named = self._named(vectors, known, knowledge.surrogate) - usual
            tokens = _filled(named, knowledge.surrogate, usual)
        return Caught(knowledge.model, seen.state, places, vectors, tokens, usual)

    def _named(
        self, vectors: Sequence[torch.Tensor], known: Rows, public: Encoded
    ) -> frozenset[int]:
        """Returns those tokens of the public records to which a vector comes near."""
        ids = torch.cat(public.inputs[: len(known)])
        found: set[int] = set()
        for number, caught in enumerate(vectors):
            tokens = torch.cat([row[number] for row in known])
            distance, nearest = _nearest(caught, tokens)
            found |= set(ids[nearest[distance < self.tolerance]].tolist())
        return frozenset(found)

    def _public(self, knowledge: Knowledge, state: Tensors) -> Rows:
        """Returns what the adapters are given for the public records."""
        assert knowledge.surrogate is not None
        places = places_of_bins(state)[: self.depth]
        return kept_inputs(
            knowledge.model,
            state,
            modules_below(places),
            knowledge.surrogate,
            self.surrogate,
        )

    def score(self, guess: Caught, secret: Secret) -> Scores:
        """One record a value: is it the nearest, and how many of its tokens are named.

        Tokens are counted once each, without those that every record has.
        """
        own = guess.distances(secret.examples)
        scores: Scores = {}
        if secret.decoys is not None:
            others = guess.distances(secret.decoys)
            scores["identification_top1"] = (own < others.min()).double()
        if guess.tokens is not None:
            scores["token_top1"] = _shares(guess.tokens, secret.examples, guess.usual)
        return scores

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Picks a record blindly; names the commonest tokens."""
        surrogate, count = observation.knowledge.surrogate, len(secret.examples)
        scores: Scores = {}
        if secret.decoys is not None:
            chance = 1 / (1 + len(secret.decoys))
            scores["identification_top1"] = torch.full((count,), chance).double()
        if surrogate is not None and _are_texts(surrogate):
            usual = _usual(surrogate)
            commonest = _filled(frozenset(), surrogate, usual)
            scores["token_top1"] = _shares(commonest, secret.examples, usual)
        return scores

    def shown(self, guess: Caught, case: Case) -> tuple[View, View] | None:
        """Shows the first text, and the tokens named in no order; no images."""
        task = guess.model.task
        if guess.tokens is None or not isinstance(
            task, TextClassification | CausalLanguageModelling
        ):
            return None
        named = sorted(words_of(task, [token]) for token in guess.tokens)
        truth = case.secret.examples.inputs[0].tolist()
        return words_of(task, truth), " ".join(named)


def _nearest(
    vectors: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each vector's distance to its nearest token, over its norm; and which."""
    distance, nearest = torch.cdist(vectors, tokens).min(1)
    return distance / vectors.norm(dim=1).clamp(min=1e-30), nearest


def _are_texts(examples: Encoded | None) -> TypeGuard[Encoded]:
    return examples is not None and examples.inputs[0].dim() == 1


def _usual(public: Encoded) -> frozenset[int]:
    """Returns the tokens that every record has, such as its first and last."""
    return frozenset.intersection(*(frozenset(i.tolist()) for i in public.inputs))


def _filled(
    named: frozenset[int], public: Encoded, usual: frozenset[int]
) -> frozenset[int]:
    """Adds the commonest tokens, up to as many as a public record has on average."""
    sets = [set(ids.tolist()) - usual for ids in public.inputs]
    most = round(sum(map(len, sets)) / len(sets))
    counts = Counter(token for tokens in sets for token in tokens - named)
    rest = counts.most_common(max(0, most - len(named)))
    return named | {token for token, _ in rest}


def _shares(
    found: frozenset[int], examples: Encoded, usual: frozenset[int]
) -> torch.Tensor:
    """Returns the share of each record's distinct tokens that is found."""
    own = [set(ids.tolist()) - usual for ids in examples.inputs]
    return torch.tensor([len(t & found) / max(1, len(t)) for t in own]).double()
