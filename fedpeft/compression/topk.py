"""The largest values of every tensor group, and where they stand."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedpeft.compression import entropy
from fedpeft.compression.groups import group_tensors
from fedpeft.compression.header import open_header, template_check, type_byte, varint
from fedpeft.compression.selection import check_density, largest, num_kept
from fedpeft.compression.values import (
    ValueType,
    check_value_type,
    from_bytes,
    from_vector,
    num_bytes,
    round_values,
    to_bytes,
    to_vector,
)
from fedpeft.errors import InvalidPayload
from fedpeft.interfaces import Compressor, Payload
from fedpeft.tensors import Tensors


def keep_largest(
    values: torch.Tensor, density: float, dtype: ValueType
) -> torch.Tensor:
    """Returns the values with all but the largest ``density`` share set to zero.

    >>> keep_largest(torch.tensor([1.0, -4.0, 3.0, 2.0]), 0.5, "fp32")
    tensor([ 0., -4.,  3.,  0.])
    """
    marked = largest(values, num_kept(density, len(values)))
    return torch.where(marked, round_values(values, dtype), 0.0)


@dataclass(frozen=True)
class TopK(Compressor):
    """Keeps the values of largest magnitude of each tensor group, exact or rounded.

    **Guarantees**: a group of n values keeps at most ``ceil(density * n)``; of equals
    the first in group order; zeros stay zeros. With fp32 the squared error is at most
    ``(1 - density)`` times the squared norm of the group. Biased: small values always
    become zero; wrap it in ``ErrorFeedback``. 16-bit values are rounded and clamped as
    in ``Dense``.

    Header: template check, one byte for the type, then per group the number kept.
    Body: the entropy-coded mask of what is kept, then the kept values.

    Attributes:
        density: share of each group that is kept, ``0 < density <= 1``.
        dtype: the type of the kept values on the wire.
    """

    codec: ClassVar[str] = "topk"
    version: ClassVar[int] = 1

    density: float
    dtype: ValueType = "fp32"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_value_type(self.dtype)

    def compress(self, update: Tensors, rng: torch.Generator) -> Payload:
        """Compresses finite tensors; deterministic, draws nothing."""
        del rng
        vector = to_vector(update)
        masks: list[entropy.Symbols] = []
        for group in group_tensors(update):
            kept = keep_largest(group.of(vector), self.density, self.dtype)
            # Without zeros: neither those of the update nor those of rounding travel.
            masks.append((kept != 0).int().numpy())
        counts = [entropy.count_symbols(mask, alphabet=2) for mask in masks]
        header = template_check(update) + type_byte(self.dtype)
        header += b"".join(varint(kept) for _, kept in counts)
        values = to_bytes(vector[_where(masks)], self.dtype)
        body = entropy.encode(masks, counts) + values
        return Payload(self.codec, self.version, header, body)

    def decompress(self, payload: Payload, like: Tensors) -> Tensors:
        """Puts the kept values in their places, zero everywhere else."""
        counts = self._read_counts(payload, like)
        coded_size = len(payload.body) - self._value_bytes(counts)
        if coded_size < 0:
            raise InvalidPayload(
                f"Expected a body of at least {self._value_bytes(counts)} bytes, got "
                f"{len(payload.body)}."
            )
        masks = entropy.decode(payload.body[:coded_size], counts)
        values = from_bytes(payload.body[coded_size:], self.dtype)
        if bool((values == 0).any()):
            raise InvalidPayload("Expected kept values other than zero, got zero.")
        vector = torch.zeros(sum(len(mask) for mask in masks))
        vector[_where(masks)] = values
        return from_vector(vector, like)

    def entropy_bits(self, payload: Payload, like: Tensors) -> float:
        """Returns the mask's entropy plus the bits of the kept values."""
        counts = self._read_counts(payload, like)
        return entropy.entropy_bits(counts) + 8 * self._value_bytes(counts)

    def _value_bytes(self, counts: list[entropy.Counts]) -> int:
        return num_bytes(sum(kept for _, kept in counts), self.dtype)

    def _read_counts(self, payload: Payload, like: Tensors) -> list[entropy.Counts]:
        reader = open_header(payload, like, codec=self.codec, version=self.version)
        reader.expect_value_type(self.dtype)
        counts: list[entropy.Counts] = []
        for group in group_tensors(like):
            kept = reader.varint(num_kept(self.density, group.size))
            counts.append((group.size - kept, kept))
        reader.end()
        return counts


def _where(masks: list[entropy.Symbols]) -> torch.Tensor:
    """Returns the indices of what is kept in the whole vector."""
    joined = np.concatenate([*masks, np.zeros(0, dtype=np.int32)])
    return torch.from_numpy(np.flatnonzero(joined))
