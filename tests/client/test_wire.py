"""Frames, chunks and messages without a socket; and that what is generated is fresh."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message
from flwr.proto.message_pb2 import Message as ProtoMessage

import client
from client import fleet_pb2 as pb
from client.flower import to_bytes
from client.outline import PATH
from client.wire import (
    CHUNK_BYTES,
    CONNECT,
    FRAME_BYTES,
    Assembler,
    Refused,
    check_protocol,
    cut,
    our_protocol,
    quoted,
    read_frame,
    read_message,
)
from fedpeft.errors import InvalidPayload
from tests.transport import request

FOLDER = Path(client.__file__).parent


def put_together(frames: list[bytes], *, keep: bool = True, limit: int = 1 << 24):
    assembler, arrivals = Assembler(limit), []
    for data in frames:
        frame, kind = read_frame(pb.ClientFrame, data)
        if kind == "begin":
            assembler.begin(frame.begin, keep=keep)
        else:
            arrivals.append(assembler.add(frame.chunk))
    return arrivals


def field(number: int, data: bytes) -> bytes:
    """Returns a field of a protocol buffer, of a number below 16."""
    size = bytearray()
    rest = len(data)
    while rest > 127:
        size.append(rest & 127 | 128)
        rest >>= 7
    return bytes([number << 3 | 2, *size, rest]) + data


def crowded(message: Message, number: int) -> Message:
    """Adds so many fields of about 12 bytes to a message."""
    values = {f"{one:03d}": one for one in range(number)}
    message.content["more"] = ConfigRecord(values)
    return message


@pytest.mark.parametrize("chunks", [0.5, 1, 1.5, 2])
def test_what_is_cut_is_put_together_again(chunks) -> None:
    data = bytes(range(256)) * int(chunks * CHUNK_BYTES / 256)
    frames = list(cut(pb.ClientFrame, "a-1", data))
    assert max(len(frame) for frame in frames) <= FRAME_BYTES
    *partial, last = put_together(frames)
    assert partial == [None] * (len(frames) - 2)
    assert (last.message_id, last.data) == ("a-1", data)


def test_what_nobody_waits_for_is_not_kept() -> None:
    (arrival,) = put_together(list(cut(pb.ClientFrame, "a-1", b"!")), keep=False)
    assert (arrival.message_id, arrival.data) == ("a-1", None)


def test_an_assembler_takes_one_message_after_the_other() -> None:
    frames = [*cut(pb.ClientFrame, "a-1", b"one"), *cut(pb.ClientFrame, "a-2", b"two")]
    arrivals = put_together(frames)
    assert [(a.message_id, a.data) for a in arrivals] == [
        ("a-1", b"one"),
        ("a-2", b"two"),
    ]


def test_a_message_of_the_limit_passes_and_one_byte_more_does_not() -> None:
    assert put_together(list(cut(pb.ClientFrame, "a-1", b"1234")), limit=4)
    with pytest.raises(Refused, match="at most 3 bytes, got one of 4") as caught:
        put_together(list(cut(pb.ClientFrame, "a-1", b"1234")), limit=3)
    assert caught.value.code == "too-large"


def test_bytes_that_are_no_message_are_an_invalid_payload() -> None:
    good = to_bytes(request(0))
    assert to_bytes(read_message(good)) == good
    for bad in (b"", b"\xff", good[:-1], good[1:]):
        with pytest.raises(InvalidPayload, match="Expected a message"):
            read_message(bad)


def test_the_outline_follows_flowers_fields_down_to_an_arrays_bytes() -> None:
    kind, names = ProtoMessage.DESCRIPTOR, []
    for number in PATH:
        field = kind.fields_by_number[number]
        kind, names = field.message_type, [*names, field.name]
    assert names == ["content", "items", "array_record", "items", "value", "data"]


def test_a_message_is_small_but_for_its_array() -> None:
    read_message(to_bytes(request(0, size=1 << 20)))
    read_message(to_bytes(crowded(request(0), 100)))
    with pytest.raises(InvalidPayload, match="at most 4096 bytes around its array"):
        read_message(to_bytes(crowded(request(0), 1000)))


@pytest.mark.parametrize(
    "bomb",
    [
        field(2, field(1, b"") * 1_000_000),  # records
        field(2, field(1, field(2, field(1, b"") * 1_000_000))),  # arrays
        field(2, field(1, field(2, field(1, field(2, field(4, b"") * 1_000_000))))),
        field(2, b"") * 1_000_000,
        field(3, b"!" * 1_000_000),  # an error's reason
        field(9, b"!" * 1_000_000),  # nothing that Flower knows
    ],
    ids=["records", "arrays", "data", "contents", "error", "unknown"],
)
def test_a_message_of_a_million_fields_is_refused_at_once(bomb) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidPayload, match="at most 4096 bytes"):
        read_message(bomb)
    assert time.monotonic() - started < 0.2


def test_what_is_quoted_is_plain_and_short() -> None:
    assert quoted("hospital-a") == "hospital-a"
    assert quoted("\x1b[2J\n") == r"\x1b[2J\n"
    assert len(quoted("\N{PILE OF POO}" * 100)) == 100


@pytest.mark.parametrize(
    ("version", "is_fine"),
    [((1, 0), True), ((1, 1), True), ((1, 2), False), ((0, 0), False), ((2, 0), False)],
)
def test_versions_one_minor_apart_are_fine(version, is_fine) -> None:
    theirs = pb.Protocol(major=version[0], minor=version[1])
    if is_fine:
        check_protocol(theirs)
    else:
        with pytest.raises(Refused, match="upgrade the older side"):
            check_protocol(theirs)


def test_the_method_is_the_one_of_the_proto_file() -> None:
    service = pb.DESCRIPTOR.services_by_name["Federation"]
    assert f"/{service.full_name}/{service.methods[0].name}" == CONNECT
    assert our_protocol().major == 1


def test_the_generated_code_is_up_to_date(tmp_path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "client/fleet.proto"]
    options = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, *options], cwd=FOLDER.parent, check=True)
    for name in ("fleet_pb2.py", "fleet_pb2.pyi"):
        fresh = (tmp_path / "client" / name).read_text()
        assert fresh == (FOLDER / name).read_text()
