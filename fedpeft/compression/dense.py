"""All values, as plain numbers."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft.compression.header import open_header, template_check, type_byte
from fedpeft.compression.values import (
    ValueType,
    check_value_type,
    from_bytes,
    from_vector,
    num_bytes,
    to_bytes,
    to_vector,
)
from fedpeft.errors import InvalidPayload
from fedpeft.interfaces import Compressor, Payload
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class Dense(Compressor):
    """Sends every value, little-endian, in group order.

    **Guarantees**: with fp32, exact for an update of fp32, bf16 or fp16. With 16 bits,
    each value is rounded to the nearest one: relative error at most ``2**-11`` (fp16)
    or ``2**-8`` (bf16) in the normal range. A value beyond the range (65504 for fp16)
    is clamped to it. Rounding is deterministic, so its error has no zero mean; error
    feedback removes that bias.

    Header: template check, one byte for the type. Body: ``2`` or ``4`` bytes a value.

    Attributes:
        dtype: the type of the values on the wire.
    """

    codec: ClassVar[str] = "dense"
    version: ClassVar[int] = 1

    dtype: ValueType = "fp32"

    def __post_init__(self) -> None:
        check_value_type(self.dtype)

    def compress(self, update: Tensors, rng: torch.Generator) -> Payload:
        """Compresses finite tensors; deterministic, draws nothing."""
        del rng
        body = to_bytes(to_vector(update), self.dtype)
        header = template_check(update) + type_byte(self.dtype)
        return Payload(self.codec, self.version, header, body)

    def decompress(self, payload: Payload, like: Tensors) -> Tensors:
        """Restores the values as they were rounded."""
        self._check(payload, like)
        return from_vector(from_bytes(payload.body, self.dtype), like)

    def entropy_bits(self, payload: Payload, like: Tensors) -> float:
        """Returns the body's bits: plain numbers are not coded."""
        self._check(payload, like)
        return 8.0 * len(payload.body)

    def _check(self, payload: Payload, like: Tensors) -> None:
        reader = open_header(payload, like, codec=self.codec, version=self.version)
        reader.expect_value_type(self.dtype)
        reader.end()
        expected = num_bytes(sum(t.numel() for t in like.values()), self.dtype)
        if len(payload.body) != expected:
            raise InvalidPayload(
                f"Expected a body of {expected} bytes, got {len(payload.body)}."
            )
