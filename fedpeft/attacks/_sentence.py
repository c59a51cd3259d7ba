"""Finds the sentence whose tokens span what was observed.

Every position takes the token of which the least lies outside the space. What makes
this work beyond the exact case:

* A direction of singular value s is known up to an angle of ``1 / s``. So a token may
  lie outside by ``sum_i (its share in direction i) / s_i^2`` a dimension, and is judged
  by that, not by a threshold.
* Where directions are missing, tokens that are sure are added to the space as known
  rows; what they lack of it completes it for the others.
* A token of the sentence looks likely at *every* position, as a word is most of its
  input. So tokens are dealt to positions, and one that is used again costs.
* What lies in the space of any text is no evidence. Shares are compared with those in
  the spaces of public texts.

Likelihoods of subspaces: Ottersten, Viberg & Kailath (1992), Analysis of subspace
fitting, IEEE Transactions on Signal Processing 40(3); the rest is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from fedpeft.attacks._span import Span, span_of
from fedpeft.attacks._text_inputs import TokenInputs

_EXACT = 1e6
"""Weight of a token that is sure, in units of the noise of one entry."""

_PRECISION = 2e-6
"""Of squared shares in single precision."""

_SHORTLIST = 60
"""Tokens a position that stay in play after the first look at the vocabulary."""

_ROOM = 0.85
"""Of the directions seen, what a text's tokens must make up."""

_AGAIN = 12.0
"""What a second use of a token costs, in nats; a third one costs twice that."""

_CANDOUR = 10.0
"""Weight of a logarithm of residuals against the prior's, where directions miss."""


@dataclass(frozen=True, eq=False)
class Found:
    """A sentence, and what else each of its positions might hold.

    Attributes:
        tokens: shape ``(length,)``, the special ones at both ends.
        ranking: the likeliest tokens of each position, shape ``(length, 10)``.
        margins: by how much, in nats, each token beats what comes next, ``(length,)``.
    """

    tokens: torch.Tensor
    ranking: torch.Tensor
    margins: torch.Tensor


@dataclass(frozen=True, eq=False)
class Ordinary:
    """The space of texts in general: a mean projector.

    Attributes:
        directions: its eigenvectors, shape ``(k, width)``.
        weights: its eigenvalues, shape ``(k,)``.
    """

    directions: torch.Tensor
    weights: torch.Tensor


def ordinary_space(
    inputs: TokenInputs, texts: Sequence[torch.Tensor], rank: int
) -> Ordinary:
    """Returns what spaces of `rank` of some public texts have in common."""
    width = inputs.words.shape[1]
    mean = torch.zeros(width, width, dtype=torch.float64)
    for text in texts:
        own = torch.linalg.svd(inputs.sentence(text), full_matrices=False)[2][:rank]
        mean += own.t() @ own / len(texts)
    weights, directions = torch.linalg.eigh(mean)
    top = slice(-min(width, 3 * rank), None)
    return Ordinary(directions[:, top].t().contiguous(), weights[top])


def significant(span: Span, rows: int) -> Span:
    """Returns the directions beyond what noise alone gives, ``sqrt(n) + sqrt(d)``.

    Source: Marchenko & Pastur (1967), the edge of their law.
    """
    edge = rows**0.5 + span.directions.shape[1] ** 0.5
    count = int((span.values > 1.02 * edge).sum())
    return Span(span.directions[:count], span.values[:count])


def likely_lengths(
    span: Span,
    ordinary: Ordinary,
    inputs: TokenInputs,
    closing: int,
    most: int,
) -> list[int]:
    """Returns lengths, those first at whose end the closing token fits best.

    A text has no fewer tokens than its span has directions, a few of noise aside.

    Args:
        span: what was observed.
        ordinary: space of texts in general.
        inputs: of all tokens.
        closing: the special token at the end.
        most: tokens of a text.
    """
    token = torch.tensor([closing])
    own, common = (inputs.shares(one.directions, token) for one in (span, ordinary))
    fits = torch.cat(
        [
            _outside(common.at(place), ordinary).log()
            - _residual(own.at(place), span)[0].log()
            for place in range(2, most)
        ]
    )
    order: list[int] = (3 + fits.argsort(descending=True)).tolist()
    room = [length for length in order if length >= _ROOM * len(span.values)]
    return room or order


def _outside(shares: torch.Tensor, ordinary: Ordinary) -> torch.Tensor:
    """Returns what lies outside ordinary space, ``(n, k)`` to ``(n,)``."""
    return (1 - shares.double() @ ordinary.weights).clamp(min=_PRECISION)


def _residual(shares: torch.Tensor, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what lies outside beyond noise, and the noise a dimension.

    Shapes: ``(n, k)`` to twice ``(n,)``, in doubles.
    """
    free = span.directions.shape[1] - len(span.values)
    outside = (1 - shares.double().sum(1)).clamp(min=_PRECISION)
    noise = shares.double() @ span.values**-2.0 + _PRECISION / free
    return (outside - free * noise).clamp(min=0.02 * outside), noise


@dataclass(frozen=True, eq=False)
class Search:
    """One sentence's search.

    Attributes:
        rows: what was observed, entries in units of their noise, ``(n, width)``.
        inputs: of all tokens.
        prior: log-probability of each token, shape ``(vocabulary,)``, in doubles.
        ordinary: space of texts in general.
    """

    rows: torch.Tensor
    inputs: TokenInputs
    prior: torch.Tensor
    ordinary: Ordinary

    def sentence(self, ends: tuple[int, int], length: int) -> Found:
        """Finds the tokens between the two special ones."""
        known = {0: ends[0], length - 1: ends[1]}
        places = list(range(1, length - 1))
        tokens = torch.arange(len(self.prior))
        common = self._common(tokens, places)
        scores, _ = self._scores(known, places, tokens, common, length)
        columns = _shortlist(scores)
        tokens, common = tokens[columns], common[:, columns]
        while True:
            scores, rank = self._scores(known, places, tokens, common, length)
            chosen = _deal(scores)
            margins = _margins(scores, chosen)
            open_rows = [row for row, p in enumerate(places) if p not in known]
            if rank >= length or not open_rows:
                break
            take = max(1, (length - rank) // 4)
            for row in sorted(open_rows, key=lambda row: -float(margins[row]))[:take]:
                known[places[row]] = int(tokens[chosen[row]])
        for row, place in enumerate(places):
            if place in known:  # is judged by the others, itself left out
                others = {p: v for p, v in known.items() if p != place}
                again, _ = self._scores(
                    others, [place], tokens, common[row : row + 1], length
                )
                again[0, torch.cat((chosen[:row], chosen[row + 1 :]))] -= _AGAIN
                scores[row], chosen[row] = again[0], again[0].argmax()
                known[place] = int(tokens[chosen[row]])
        return _found(ends, tokens, scores, chosen, _margins(scores, chosen), known)

    def _common(self, tokens: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """Returns logarithms of what lies outside ordinary space, (places, n)."""
        shares = self.inputs.shares(self.ordinary.directions, tokens)
        outside = [_outside(shares.at(place), self.ordinary) for place in places]
        return torch.stack(outside).log()

    def _scores(
        self,
        known: dict[int, int],
        places: Sequence[int],
        tokens: torch.Tensor,
        common: torch.Tensor,
        length: int,
    ) -> tuple[torch.Tensor, int]:
        """Returns each token's score at each place, ``(places, n)``, and the rank."""
        sure = torch.cat(
            [self.inputs.vectors(torch.tensor([v]), p) for p, v in known.items()]
        )
        stacked = torch.cat((self.rows, _EXACT * sure))
        span = significant(span_of(stacked), len(self.rows))
        span = Span(span.directions[:length], span.values[:length])
        free, rank = stacked.shape[1] - len(span.values), len(span.values)
        shares = self.inputs.shares(span.directions, tokens)
        scores = []
        for row, place in enumerate(places):
            squared = shares.at(place)
            outside, noise = _residual(squared, span)
            if rank < length:
                score = _CANDOUR * (common[row] - outside.log())
            else:
                gone = (1 - squared.double().sum(1)).clamp(min=_PRECISION)
                score = -free / 2 * noise.log() - gone / (2 * noise)
            scores.append(score + self.prior[tokens])
        return torch.stack(scores), rank


def _shortlist(scores: torch.Tensor) -> torch.Tensor:
    """Returns the columns that are among the best of any place, ascending."""
    best = scores.topk(min(_SHORTLIST, scores.shape[1])).indices
    is_in = torch.zeros(scores.shape[1], dtype=torch.bool)
    is_in[best.flatten()] = True
    return is_in.nonzero()[:, 0]


def _deal(scores: torch.Tensor) -> torch.Tensor:
    """Deals tokens to places, at most three times each; returns columns, (places,)."""
    uses = torch.cat([scores - times * _AGAIN for times in range(3)], 1)
    chosen = linear_sum_assignment(-uses.numpy())[1]
    return torch.from_numpy(chosen) % scores.shape[1]


def _margins(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Returns by how much each choice beats other tokens there, and other places."""
    rows = torch.arange(len(scores))
    own = scores[rows, chosen]
    rest = scores.clone()
    rest[rows, chosen] = -torch.inf
    elsewhere = scores[:, chosen].clone()
    elsewhere.fill_diagonal_(-torch.inf)
    return own - torch.maximum(rest.amax(1), elsewhere.amax(0))


def _found(
    ends: tuple[int, int],
    tokens: torch.Tensor,
    scores: torch.Tensor,
    chosen: torch.Tensor,
    margins: torch.Tensor,
    known: dict[int, int],
) -> Found:
    """Puts the special tokens around, and each choice at the head of its ranking."""
    ranking = torch.empty(len(scores) + 2, min(10, len(tokens)), dtype=torch.int64)
    ranking[0], ranking[-1] = ends
    for row, column in enumerate(chosen.tolist()):
        sure = known.get(row + 1, int(tokens[column]))
        order = tokens[scores[row].argsort(descending=True)[: ranking.shape[1]]]
        rest = order[order != sure][: ranking.shape[1] - 1]
        ranking[row + 1] = torch.cat((torch.tensor([sure]), rest))
    edge = torch.full((1,), torch.inf, dtype=torch.float64)
    return Found(ranking[:, 0].clone(), ranking, torch.cat((edge, margins, edge)))
