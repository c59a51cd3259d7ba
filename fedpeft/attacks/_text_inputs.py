"""The first block's input as a public function of token and position.

A backbone of BERT's kind gives its first block ``LayerNorm(word + position + kind)``:
nothing of it depends on the other tokens, and nothing of it trains. So the input of
every token of the vocabulary, at every position, can be had without a single pass.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fedpeft.tasks import TaskModule


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """``gain * centred(word + position) / deviation + shift`` for all tokens.

    Attributes:
        words: less their mean over the features, shape ``(vocabulary, width)``.
        positions: with the kind of token, less their mean, ``(positions, width)``.
        gain: of the LayerNorm, shape ``(width,)``.
        shift: of the LayerNorm, shape ``(width,)``.
        epsilon: of the LayerNorm.
        deviations: of each sum before it is normalised, ``(vocabulary, positions)``.
        lengths: of each input, ``(vocabulary, positions)``.
    """

    words: torch.Tensor
    positions: torch.Tensor
    gain: torch.Tensor
    shift: torch.Tensor
    epsilon: float
    deviations: torch.Tensor
    lengths: torch.Tensor

    def vectors(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Returns the inputs of some tokens at one position, in doubles.

        Shapes: ``(n,)`` to ``(n, width)``.
        """
        centred = (self.words[tokens] + self.positions[position]).double()
        deviation = (centred.square().mean(1, keepdim=True) + self.epsilon).sqrt()
        return centred / deviation * self.gain.double() + self.shift.double()

    def sentence(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the input of a whole text, shape ``(len(tokens), width)``."""
        rows = (self.vectors(token[None], at) for at, token in enumerate(tokens))
        return torch.cat([*rows])

    def shares(
        self, directions: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> "Shares":
        """Prepares the tokens' shares in orthonormal rows ``(k, width)``.

        Args:
            directions: in doubles.
            tokens: of which the shares are wanted, shape ``(n,)``; None for all.
        """
        chosen = slice(None) if tokens is None else tokens
        rows = (directions * self.gain.double()).to(self.words.dtype)
        return Shares(
            self.words[chosen] @ rows.t(),
            self.positions @ rows.t(),
            (directions @ self.shift.double()).to(self.words.dtype),
            self.deviations[chosen],
            self.lengths[chosen],
        )


@dataclass(frozen=True, eq=False)
class Shares:
    """How much of each token's input lies in each of k directions, by position.

    Attributes:
        of_words: what the word alone has there, before it is normalised, ``(n, k)``.
        of_positions: what the position alone has there, ``(positions, k)``.
        offset: what the shift has there, ``(k,)``.
        deviations: see :class:`TokenInputs`.
        lengths: likewise.
    """

    of_words: torch.Tensor
    of_positions: torch.Tensor
    offset: torch.Tensor
    deviations: torch.Tensor
    lengths: torch.Tensor

    def at(self, position: int) -> torch.Tensor:
        """Returns squared cosines, shape ``(n, k)``."""
        inside = self.of_words + self.of_positions[position]
        inside /= self.deviations[:, position, None]
        inside += self.offset
        inside /= self.lengths[:, position, None]
        return inside.square_()


@lru_cache(maxsize=1)
def token_inputs(module: TaskModule, positions: int) -> TokenInputs | None:
    """Reads the first positions' inputs from a backbone.

    Returns:
        None where the backbone makes its input in another way.
    """
    parts: Any = getattr(module.backbone, "embeddings", None)
    norm = getattr(parts, "LayerNorm", None)
    if not isinstance(norm, nn.LayerNorm) or not hasattr(parts, "word_embeddings"):
        return None
    places = parts.position_embeddings.weight.detach()
    padding = parts.position_embeddings.padding_idx
    places = places[0 if padding is None else padding + 1 :][:positions]
    kinds = getattr(parts, "token_type_embeddings", None)
    if kinds is not None:
        places = places + kinds.weight.detach()[0]
    words, places = _centred(parts.word_embeddings.weight.detach()), _centred(places)
    gain, shift = norm.weight.detach(), norm.bias.detach()
    deviations = (_energies(words, places) / words.shape[1] + norm.eps).sqrt()
    mixed = (words @ (gain * shift))[:, None] + places @ (gain * shift)
    energies = _energies(words * gain, places * gain) / deviations**2
    lengths = (energies + 2 * mixed / deviations + shift.square().sum()).sqrt()
    return TokenInputs(words, places, gain, shift, norm.eps, deviations, lengths)


def _centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(1, keepdim=True)


def _energies(words: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Returns the squared length of each sum, shape ``(vocabulary, positions)``."""
    single = words.square().sum(1)[:, None] + places.square().sum(1)
    return single + 2 * words @ places.t()
