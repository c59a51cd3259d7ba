"""Frames, chunks and messages without a socket; and that what is generated is fresh."""

import subprocess
import sys
from pathlib import Path

import pytest

import client
from client import fleet_pb2 as pb
from client.flower import to_bytes
from client.wire import (
    CHUNK_BYTES,
    CONNECT,
    FRAME_BYTES,
    Assembler,
    Refused,
    check_protocol,
    cut,
    our_protocol,
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
