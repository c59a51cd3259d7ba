"""The entropy coder: symbols of several groups, each with its own model, to bytes.

Asymmetric numeral systems (Duda 2013, arXiv:1311.2540) in the implementation of the
``constriction`` library. The model of a group is its exact counts, which travel in the
header. All groups share one coder, so that what a coder costs to end (about three
bytes) is paid once and not once a group.

The coder checks nothing by itself: it turns any bytes into symbols, and gives a symbol
that never occurs a small probability without a word. So three checks stand here: only
symbols that occur are in a model; after decoding the coder must be empty, as it was
before encoding; and the decoded symbols must have the counts that were announced.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import constriction
import numpy as np
import numpy.typing as npt

from fedpeft.errors import InvalidPayload

Symbols: TypeAlias = npt.NDArray[np.int32]
Counts: TypeAlias = tuple[int, ...]
"""How often symbols 0, 1, ... occur in a group."""

_AnsCoder: TypeAlias = constriction.stream.stack.AnsCoder
_Categorical: TypeAlias = constriction.stream.model.Categorical


def count_symbols(symbols: Symbols, alphabet: int) -> Counts:
    """Returns how often each of the symbols ``0 .. alphabet - 1`` occurs."""
    return tuple(np.bincount(symbols, minlength=alphabet).tolist())


def entropy_bits(groups: Sequence[Counts]) -> float:
    """Returns the entropy of symbols with these counts, in bits.

    That is the sum over groups of ``size * H(counts / size)``: the best that one fixed
    code for a group's symbols can reach. The counts themselves are not included.

    >>> entropy_bits([(1, 2, 1), (5, 0, 0)])
    6.0
    """
    return math.fsum(
        count * math.log2(sum(counts) / count)
        for counts in groups
        for count in counts
        if count
    )


def encode(groups: Sequence[Symbols], counts: Sequence[Counts]) -> bytes:
    """Returns the coded symbols.

    Args:
        groups: one array of symbols a group.
        counts: each group's :func:`count_symbols`.
    """
    coder = _AnsCoder()
    # A stack: what is encoded last is decoded first.
    for symbols, group in zip(reversed(groups), reversed(counts), strict=True):
        present = np.flatnonzero(group)
        if len(present) > 1:
            ranks = np.searchsorted(present, symbols).astype(np.int32)
            coder.encode_reverse(ranks, _categorical(group))
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return words.rstrip(b"\0")


def decode(body: bytes, counts: Sequence[Counts]) -> list[Symbols]:
    """Restores what :func:`encode` was given.

    The counts decide how much is allocated: check them against the template first.

    Raises:
        InvalidPayload: if no symbols with these counts give this body.
    """
    coder = _AnsCoder(_to_words(body, counts))
    groups = [_decode_group(coder, group) for group in counts]
    if not coder.is_empty():
        raise InvalidPayload(
            "Expected the coded symbols to end, got more: the body is damaged."
        )
    return groups


def _categorical(counts: Counts) -> _Categorical:
    present = [float(count) for count in counts if count]
    return _Categorical(np.array(present), perfect=False)


def _to_words(body: bytes, counts: Sequence[Counts]) -> npt.NDArray[np.uint32]:
    size = sum(sum(group) for group in counts)
    # Beyond the entropy: probabilities of 24 bits, and the last word.
    limit = (1.01 * entropy_bits(counts) + size / 2**20) / 8 + 16
    if len(body) > limit or body.endswith(b"\0"):
        raise InvalidPayload(
            f"Expected at most {int(limit)} bytes of coded symbols, got {len(body)}, "
            "or bytes that the coder does not write."
        )
    padded = body + bytes(-len(body) % 4)
    return np.frombuffer(padded, dtype="<u4").astype(np.uint32)


def _decode_group(coder: _AnsCoder, counts: Counts) -> Symbols:
    size, present = sum(counts), np.flatnonzero(counts).astype(np.int32)
    if len(present) < 2:
        return np.full(size, present[0] if size else 0, dtype=np.int32)
    symbols: Symbols = present[coder.decode(_categorical(counts), size)]
    if count_symbols(symbols, len(counts)) != counts:
        raise InvalidPayload(
            f"Expected symbols with the counts {counts}, decoded others: the body is "
            "damaged."
        )
    return symbols
