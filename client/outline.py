"""How much of a message is not its array's bytes, told before anything is parsed.

A parser makes objects of fields, many times as large and slow as a field that holds
nothing. Our messages have one array and a few words around it, so one that has much
else is none of ours, and is refused on what its fields' lengths say.

Source: https://protobuf.dev/programming-guides/encoding
"""

from fedpeft.errors import InvalidPayload

HEADER_BYTES = 4096
"""Of a message, without its array's bytes; ours have about 400."""

PATH = (2, 1, 2, 1, 2, 4)
"""From a Flower message to an array's bytes: content, its items, each one's array
record, its items, each one's value, its data."""

_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}


def check_outline(data: bytes | bytearray) -> None:
    """Makes sure that a message is small but for the bytes of arrays.

    **Guarantees**: looks at no more than :data:`HEADER_BYTES` fields, whatever came.

    Raises:
        InvalidPayload: if it is not, or is no protocol buffer.
    """
    if _around(memoryview(data), PATH) > HEADER_BYTES:
        raise InvalidPayload(
            f"Expected a message of at most {HEADER_BYTES} bytes around its array, got "
            f"more, of {len(data)} in all."
        )


def _around(data: memoryview, path: tuple[int, ...]) -> int:
    """Returns the bytes that are not an array's; stops once they are too many."""
    count = at = 0
    while at < len(data) and count <= HEADER_BYTES:
        tag, start = _varint(data, at)
        kind, size = tag & 7, 0
        if kind == _VARINT:
            _, start = _varint(data, start)
        elif kind == _DELIMITED:
            size, start = _varint(data, start)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise InvalidPayload(f"Expected a message, got a field of kind {kind}.")
        count, at = count + start - at, start + size
        if at > len(data):
            raise InvalidPayload("Expected a message, got a part of one.")
        if kind != _DELIMITED or tag >> 3 != path[0]:
            count += size
        elif path[1:]:
            count += _around(data[start:at], path[1:])
    return count


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Returns a number, 7 bits a byte, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise InvalidPayload("Expected a message, got no field's number.")
