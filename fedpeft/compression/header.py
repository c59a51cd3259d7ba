"""Headers: a check of the template, then what the codec adds, in few bytes.

Names and shapes never travel. Their CRC-32 does, so that a sender with another method,
rank or model is refused and not decoded into plausible junk.
"""

import io
import struct
import zlib

from fedpeft.compression.values import VALUE_TYPES, ValueType
from fedpeft.errors import InvalidPayload
from fedpeft.interfaces import Payload
from fedpeft.tensors import Tensors


def template_check(like: Tensors) -> bytes:
    """Returns four bytes that depend on names and shapes; not on order or dtype."""
    lines = [f"{name} {tuple(like[name].shape)}" for name in sorted(like)]
    return struct.pack("<I", zlib.crc32("\n".join(lines).encode()))


def varint(number: int) -> bytes:
    r"""Returns a number >= 0 in base 128, low digits first.

    >>> varint(5), varint(300)
    (b'\x05', b'\xac\x02')
    """
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def float32(number: float) -> bytes:
    """Returns four little-endian bytes."""
    return struct.pack("<f", number)


def type_byte(dtype: ValueType) -> bytes:
    """Returns one byte for the type of the values in the body."""
    return bytes([VALUE_TYPES.index(dtype)])


class HeaderReader:
    """Reads a header from left to right; all that is wrong is an InvalidPayload."""

    def __init__(self, header: bytes) -> None:
        self._stream = io.BytesIO(header)

    def take(self, count: int) -> bytes:
        """Returns the next bytes."""
        taken = self._stream.read(count)
        if len(taken) < count:
            raise InvalidPayload("Expected a longer payload header: it was cut.")
        return taken

    def varint(self, maximum: int) -> int:
        """Returns a number from 0 to `maximum`, written in its shortest form."""
        number = shift = 0
        while True:
            (digit,) = self.take(1)
            number |= (digit & 127) << shift
            if digit < 128:
                break
            shift += 7
            if number > maximum:
                break
        if number > maximum or (digit == 0 and shift):
            raise InvalidPayload(
                f"Expected a count of at most {maximum} in the payload header, got "
                "another; client and server need the same density and template."
            )
        return number

    def float32(self) -> float:
        """Returns a number, finite or not."""
        number: float = struct.unpack("<f", self.take(4))[0]
        return number

    def expect_value_type(self, dtype: ValueType) -> None:
        """Refuses another type than the one whose :func:`type_byte` was written."""
        if self.take(1) != type_byte(dtype):
            raise InvalidPayload(
                f"Expected values of type {dtype}, got another type; client and server "
                "need the same dtype."
            )

    def end(self) -> None:
        """Refuses bytes that are left over."""
        left = len(self._stream.read())
        if left:
            raise InvalidPayload(
                f"Expected the payload header to end, got {left} more bytes."
            )


def open_header(
    payload: Payload, like: Tensors, *, codec: str, version: int
) -> HeaderReader:
    """Returns a reader behind the template check.

    Raises:
        InvalidPayload: for another codec, version or template.
    """
    if (payload.codec, payload.version) != (codec, version):
        raise InvalidPayload(
            f"Expected a payload of {codec} version {version}, got {payload.codec!r} "
            f"version {payload.version}; client and server need the same compressor."
        )
    reader = HeaderReader(payload.header)
    if reader.take(4) != template_check(like):
        raise InvalidPayload(
            "Expected the names and shapes of the server's trainable tensors, got a "
            "payload of others; client and server need the same method and model."
        )
    return reader
