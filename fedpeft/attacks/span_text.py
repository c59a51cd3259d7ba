"""Reads a client's sentence out of what adapters of the first block learned.

The rows of LoRA's A that the rounds show lie in the span of the sentence's tokens (see
``_span``), which are a public function of word and position. So the vocabulary is
ranked at every position by what of a token lies outside that span, weighted by how well
each direction is known (see ``_sentence``); what public texts look like decides between
equals; and where that leaves a doubt, the sentences in question are trained on, as the
client would have, and the one whose update is most like the client's is kept.

Nothing here needs a large rank, plain steps or an exact update: a rank of 4 is
completed by further rounds and by the tokens found so far, the first step of AdamW is
undone, and noise lowers the number of directions that are known, not the idea.

Source: Petrov et al. (2024), DAGER, arXiv:2405.15586, for exact gradients of full rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft.attacks._reading import read_all
from fedpeft.attacks._sentence import (
    Found,
    Search,
    likely_lengths,
    ordinary_space,
    significant,
)
from fedpeft.attacks._simulated import labels_of
from fedpeft.attacks._span import (
    Reader,
    find_readers,
    first_input,
    span_of,
    stacked_rows,
)
from fedpeft.attacks._text_inputs import TokenInputs, token_inputs
from fedpeft.attacks._text_match import TextMatch
from fedpeft.attacks._text_scores import text_scores, words_of
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
from fedpeft.tasks import TextClassification

_TEXTS = 40
"""Public texts that show what is common to all."""

_TRIAL = 4
"""Tokens of a text that is only tried."""

_EXPLAINED = 0.9999
"""A match from which on there is nothing left to improve."""


@dataclass(frozen=True)
class SpanText(Attack[torch.Tensor]):
    """Ranks tokens by position; a guess is of shape ``(length, 10)``, best first.

    One sentence is sought a client. Of a client with several, what is found belongs to
    none of them in particular.

    Attributes:
        lengths: how many lengths are tried, until one explains the update.
        tries: other tokens that are then tried, at most.
        relative_noise: that each tensor of an update is known to carry, over its own
            norm; the noise of DP-SGD is estimated without it.
    """

    lengths: int = 3
    tries: int = 12
    relative_noise: float = 0.0

    needs: ClassVar[ThreatModel] = ThreatModel("D", "aggregate", "reconstruct")
    undoes_optimizer: ClassVar[bool] = True
    metrics: ClassVar[dict[str, str]] = {
        "token_top1": "share",
        "token_top10": "share",
        "rouge_l": "share",
        "exact_match": "share",
    }

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Wants texts, and a trained matrix right behind their embeddings."""
        task = knowledge.model.task
        if not isinstance(task, TextClassification):
            return "its records are no texts with labels"
        if not knowledge.surrogate:
            return "there are no public texts of the same kind"
        inputs = token_inputs(knowledge.model.module, task.max_length)
        if inputs is None:
            return "the backbone mixes word and position in an unknown way"
        readers = _readers(knowledge)
        if not readers:
            return "no trained matrix reads the first block's input"
        given = first_input(knowledge.model.module, readers[0], _trial(knowledge))[0]
        expected = inputs.sentence(torch.arange(_TRIAL)).to(given)
        if given.shape != expected.shape or not given.allclose(expected, atol=1e-3):
            return "what trained matrices read first depends on more than the token"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> torch.Tensor:
        """Returns the likeliest tokens of every position, special ones included."""
        del rng  # nothing is drawn
        last = observation.seen[-1]
        labels = labels_of(observation.knowledge, last, 1)
        label = torch.tensor(0) if labels is None else labels[0]
        match = TextMatch(observation.knowledge, last, self.relative_noise, label)
        tried: list[tuple[float, Found]] = []
        for found in self._candidates(observation):
            tried.append((match.of(found.tokens), found))
            if tried[-1][0] > _EXPLAINED:
                return found.ranking
        if not tried:
            return _commonest(observation.knowledge)
        fit, found = max(tried, key=lambda pair: pair[0])
        return self._improved(found, fit, match)

    def _candidates(self, observation: Observation) -> Iterator[Found]:
        """Yields the best sentence of each likely length, the likeliest first.

        None, where nothing stands out of the noise.
        """
        knowledge = observation.knowledge
        task, inputs, surrogate = _parts(knowledge)
        readings = read_all(observation.seen, knowledge, self.relative_noise)
        rows = stacked_rows(
            [reading.values for reading in readings],
            [reading.deviations for reading in readings],
            [reader.name for reader in _readers(knowledge)],
        )
        if len(rows) == 0:
            return
        span = significant(span_of(rows), len(rows))
        if len(span.values) == 0:
            return
        texts = surrogate.inputs[:_TEXTS]
        ordinary = ordinary_space(inputs, texts, min(len(span.values), 30))
        search = Search(rows, inputs, _prior(knowledge), ordinary)
        ends = (task.tokenizer.cls_token_id, task.tokenizer.sep_token_id)
        order = likely_lengths(span, ordinary, inputs, ends[1], task.max_length)
        for length in order[: self.lengths]:
            found = search.sentence(ends, length)
            inside = (found.tokens[1:-1] == ends[1]).nonzero()
            if len(inside) > 0:  # so the text ends there
                found = search.sentence(ends, int(inside[0]) + 2)
            yield found

    def _improved(self, found: Found, fit: float, match: TextMatch) -> torch.Tensor:
        """Tries other tokens where the choice was close, and keeps what fits better."""
        ranking = found.ranking.clone()
        close = found.margins.argsort()[: len(ranking) - 2].tolist()
        swaps = [(place, column) for place in close for column in (1, 2)]
        for place, column in swaps[: self.tries]:
            other = _promoted(ranking, place, column)
            new = match.of(other[:, 0])
            if new > fit:
                ranking, fit = other, new
        return ranking

    def score(self, guess: torch.Tensor, secret: Secret) -> Scores:
        """Compares with every sentence of the client."""
        return text_scores(guess, secret.examples)

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Scores the commonest tokens of public texts, at every position the same."""
        del rng
        return text_scores(_commonest(observation.knowledge), secret.examples)

    def shown(self, guess: torch.Tensor, case: Case) -> tuple[View, View]:
        """Shows the first sentence, and the likeliest token of every position."""
        task, _, _ = _parts(case.observation.knowledge)
        truth = case.secret.examples.inputs[0]
        return words_of(task, truth.tolist()), words_of(task, guess[:, 0].tolist())


def _promoted(ranking: torch.Tensor, place: int, column: int) -> torch.Tensor:
    """Returns the rankings with one position's token put first."""
    other = ranking.clone()
    other[place, 0], other[place, column] = ranking[place, column], ranking[place, 0]
    return other


def _commonest(knowledge: Knowledge) -> torch.Tensor:
    """Returns the commonest tokens of public texts, for every position the same."""
    task, _, _ = _parts(knowledge)
    return _prior(knowledge).topk(10).indices.expand(task.max_length, 10)


def _parts(knowledge: Knowledge) -> tuple[TextClassification, TokenInputs, Encoded]:
    task = knowledge.model.task
    assert isinstance(task, TextClassification)
    inputs = token_inputs(knowledge.model.module, task.max_length)
    assert inputs is not None
    assert knowledge.surrogate is not None
    return task, inputs, knowledge.surrogate


def _trial(knowledge: Knowledge) -> dict[str, torch.Tensor]:
    """Returns a text of the vocabulary's first tokens, as the backbone takes it."""
    ids = torch.arange(_TRIAL, device=knowledge.model.device)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _readers(knowledge: Knowledge) -> list[Reader]:
    model = knowledge.model
    model.module.eval()
    return find_readers(model.module, model.operations, _trial(knowledge))


def _prior(knowledge: Knowledge) -> torch.Tensor:
    """Returns the log-probability of each token in public texts, in doubles.

    Every token of the vocabulary is credited with a twentieth of an occurrence.
    """
    _, inputs, surrogate = _parts(knowledge)
    counts = torch.full((len(inputs.words),), 0.05, dtype=torch.float64)
    inside = torch.cat([text[1:-1] for text in surrogate.inputs])
    counts += torch.bincount(inside, minlength=len(counts))
    return (counts / counts.sum()).log()
