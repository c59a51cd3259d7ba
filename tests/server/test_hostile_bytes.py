"""20,000 mutated frames, messages and payloads: each is refused by a typed error."""

import functools
import logging
import random
from pathlib import Path

import pytest
import torch

from client import fleet_pb2 as pb
from client.flower import set_message_id, to_bytes
from client.wire import Assembler, Refused, cut, read_frame, read_message
from fedpeft.compression import COMPRESSORS
from fedpeft.errors import InvalidPayload
from fedpeft.interfaces import Payload
from tests.transport import Loopback, data_of, reply_to, request

LIKE = {"adapter": torch.zeros(12, 8), "head": torch.zeros(4)}
CODECS = {
    name: make(**({} if name == "dense" else {"density": 0.3}))
    for name, make in COMPRESSORS.items()
}
LIMIT = 1 << 16
GROWTH_BYTES = 64 << 20


def memory_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def forget_the_peak() -> None:
    """Has Linux count VmHWM from now on."""
    Path("/proc/self/clear_refs").write_text("5")


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


@functools.cache
def good_payloads() -> list[Payload]:
    update = {
        "adapter": torch.linspace(-1, 1, 96).reshape(12, 8),
        "head": torch.tensor([0.0, 1.0, -2.0, 0.5]),
    }
    rng = torch.Generator().manual_seed(0)
    return [codec.compress(update, rng) for codec in CODECS.values()]


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


def hurt(message_id: str, rng: random.Random) -> list[bytes]:
    """Returns an answer's frames, hurt as frames, as a message, or as a payload."""
    payload = rng.choice(good_payloads())
    layer = rng.randrange(5)
    if layer == 0:  # checksum and all
        content = mutated(payload.to_bytes(), rng)
    elif layer == 1:  # with a checksum that is right
        header = mutated(payload.header, rng)
        content = Payload(payload.codec, 1, header, payload.body).to_bytes()
    elif layer == 2:
        body = mutated(payload.body, rng)
        content = Payload(payload.codec, 1, payload.header, body).to_bytes()
    else:
        content = payload.to_bytes()
    asked = request(0)
    set_message_id(asked, message_id)
    data = to_bytes(reply_to(asked, content))
    if layer == 3:
        data = mutated(data, rng)
    frames = list(cut(pb.ClientFrame, message_id, data))
    if layer == 4:
        at = rng.randrange(len(frames))
        frames[at] = mutated(frames[at], rng)
    return frames


@pytest.mark.slow
def test_every_mutation_is_a_typed_error_or_none() -> None:
    rng, refused, before = random.Random(0), 0, memory_bytes("VmRSS")
    forget_the_peak()
    for _ in range(20_000):
        try:
            decode(hurt("a-1", rng))
        except (InvalidPayload, Refused):
            refused += 1
    assert refused > 15_000
    assert memory_bytes("VmHWM") - before < GROWTH_BYTES


@pytest.mark.slow
def test_a_living_server_outlives_hostile_clients(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    loopback = Loopback(tmp_path, max_reply_bytes=LIMIT)
    grid, rng, before = loopback.grid, random.Random(1), memory_bytes("VmRSS")
    forget_the_peak()
    good, accepted, asked = loopback.ready("hospital-b"), 0, ""
    for number in range(400):
        if not asked:
            (asked,) = grid.push_messages([request(0)])
        bad = loopback.by_hand("hospital-a")
        ready = pb.ClientFrame(ready=pb.Ready(accepted=loopback.proposal.hash))
        opening = [pb.ClientFrame(hello=bad.hello()), ready]
        frames = [frame.SerializeToString() for frame in opening] + hurt(asked, rng)
        if number % 4 == 0:
            at = rng.randrange(2)
            frames[at] = mutated(frames[at], rng)
        bad.send(*frames)
        bad.finish()
        bad.close()
        for reply in grid.pull_messages([asked]):
            accepted, asked = accepted + (not reply.has_error()), ""
    (message_id,) = grid.push_messages([request(1)])
    good.answer(good.message(), b"undisturbed")
    good.hear("received")
    (answer,) = grid.pull_messages([message_id])
    assert data_of(answer) == b"undisturbed"
    assert memory_bytes("VmHWM") - before < GROWTH_BYTES
    codes = grid.counts()
    assert 0 < accepted < 400 - codes["invalid-frame"]
    assert len([r for r in caplog.records if "refused" in r.getMessage()]) == sum(
        count for code, count in codes.items() if code not in ("duplicate", "unknown")
    )
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    loopback.close()
