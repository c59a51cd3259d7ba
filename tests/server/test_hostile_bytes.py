"""20,000 mutated frames, messages and payloads: each is refused by a typed error."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from client import fleet_pb2 as pb
from client.flower import set_identity, set_message_id, to_bytes
from client.messages import TrainReply
from client.wire import Assembler, Refused, cut, our_protocol, read_frame, read_message
from fedpeft.compression import COMPRESSORS
from fedpeft.errors import InvalidPayload
from fedpeft.interfaces import Payload
from simulations.benchmarks.measuring import _status_bytes
from tests.transport import Loopback, data_of, reply_to, request

LIKE = {"adapter": torch.zeros(12, 8), "head": torch.zeros(4)}
CODECS = {
    name: make(**({} if name == "dense" else {"density": 0.3}))
    for name, make in COMPRESSORS.items()
}
LIMIT = 1 << 16
GROWTH_BYTES = 64 << 20


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Changes, cuts, repeats, swaps or inserts some bytes; perhaps several times."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 2, 4, 16, 256)))
        way = rng.randrange(6)
        if way == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            changed[at:end] = rng.choice((b"\x00", b"\xff", b"\x7f")) * (end - at)
        elif way == 2:
            del changed[at:end]
        elif way == 3:
            changed[at:at] = changed[at:end]
        elif way == 4:
            changed[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
        else:
            del changed[at:]
    return bytes(changed)


def good_payloads() -> list[Payload]:
    update = {
        "adapter": torch.linspace(-1, 1, 96).reshape(12, 8),
        "head": torch.tensor([0.0, 1.0, -2.0, 0.5]),
    }
    rng = torch.Generator().manual_seed(0)
    return [codec.compress(update, rng) for codec in CODECS.values()]


def reply(payload: bytes) -> bytes:
    set_identity()
    message = request(0)
    set_message_id(message, "a-1")
    return to_bytes(reply_to(message, payload))


def decode(frames: list[bytes]) -> None:
    """All that the server does with what a client sends."""
    assembler = Assembler(LIMIT)
    for data in frames:
        frame, kind = read_frame(pb.ClientFrame, data)
        if kind == "begin":
            assembler.begin(frame.begin, keep=True)
        elif kind == "chunk":
            arrival = assembler.add(frame.chunk)
            if arrival is not None and arrival.data is not None:
                message = read_message(arrival.data)
                if not message.has_error():
                    payload = Payload.from_bytes(data_of(message))
                    codec = CODECS.get(payload.codec, CODECS["dense"])
                    codec.decompress(payload, LIKE)


def hostile(number: int) -> Iterator[list[bytes]]:
    """Yields streams of frames: hurt as frames, as messages, or as payloads."""
    rng = random.Random(0)
    payloads = good_payloads()
    for _ in range(number):
        payload = rng.choice(payloads)
        layer = rng.randrange(5)
        if layer == 0:  # checksum and all
            content = mutated(payload.to_bytes(), rng)
        elif layer == 1:  # with a checksum that is right
            header = mutated(payload.header, rng)[:65535]
            content = Payload(payload.codec, 1, header, payload.body).to_bytes()
        elif layer == 2:
            body = mutated(payload.body, rng)
            content = Payload(payload.codec, 1, payload.header, body).to_bytes()
        else:
            content = payload.to_bytes()
        message = reply(content)
        if layer == 3:
            message = mutated(message, rng)
        frames = list(cut(pb.ClientFrame, "a-1", message or b"!"))
        if layer == 4:
            at = rng.randrange(len(frames))
            frames[at] = mutated(frames[at], rng)
        yield frames


@pytest.mark.slow
def test_every_mutation_is_a_typed_error_or_no_error() -> None:
    before, refused = _status_bytes("VmRSS"), 0
    for frames in hostile(20_000):
        try:
            decode(frames)
        except (InvalidPayload, Refused):
            refused += 1
    assert refused > 15_000
    assert _status_bytes("VmHWM") - before < GROWTH_BYTES
