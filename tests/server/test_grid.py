"""The grid against clients made by hand: exchange, refusals, what arrives too late."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from flwr.app import Message
from flwr.proto.message_pb2 import Message as ProtoMessage

from client import fleet_pb2 as pb
from client.flower import to_bytes
from client.wire import CHUNK_BYTES, FRAME_BYTES, cut, read_message
from fedpeft.errors import RunError
from server import fleet, mailbox
from server.grid import GrpcGrid
from tests.transport import (
    NAMES,
    HandMade,
    Loopback,
    data_of,
    reply_to,
    request,
    wait_until,
)


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    loopback = Loopback(tmp_path)
    yield loopback
    loopback.close()


def sent(
    loopback: Loopback, *clients: int, timeout: float = 20.0
) -> Callable[[], list[Message]]:
    """Starts an exchange in a thread; the result waits for its end."""
    replies: list[Message] = []

    def exchange() -> None:
        messages = [request(client) for client in clients]
        replies.extend(loopback.grid.send_and_receive(messages, timeout=timeout))

    thread = threading.Thread(target=exchange)
    thread.start()

    def result() -> list[Message]:
        thread.join(30)
        assert not thread.is_alive()
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    return result


# --- exchange ---------------------------------------------------------------------


def test_every_client_gets_its_request_and_every_answer_comes_back(loopback) -> None:
    clients = [loopback.ready(name) for name in ("hospital-b", "hospital-a")]
    result = sent(loopback, 0, 1)
    for client in clients:
        message = client.message()
        client.answer(message, client.name.encode())
        received = client.hear("received")
        assert received.message_id == message.metadata.message_id
    assert [data_of(reply) for reply in result()] == [b"hospital-a", b"hospital-b"]
    assert loopback.grid.connected() == ["hospital-a", "hospital-b"]
    assert loopback.grid.connections() == {0: 1, 1: 1}
    assert loopback.grid.get_node_ids() == [1, 2, 3]
    assert loopback.grid.counts() == {}


def test_pushed_messages_are_pulled_once_they_are_answered(loopback) -> None:
    client = loopback.ready("hospital-a")
    (message_id,) = loopback.grid.push_messages([request(0)])
    assert loopback.grid.pull_messages([message_id]) == []
    client.answer(client.message(), b"once")
    client.hear("received")
    (reply,) = loopback.grid.pull_messages([message_id])
    assert data_of(reply) == b"once"
    assert loopback.grid.pull_messages([message_id]) == []


def test_a_message_of_many_chunks_arrives_whole(loopback) -> None:
    client = loopback.ready("hospital-a")
    data = bytes(range(256)) * (5 * CHUNK_BYTES // 512)  # two chunks and a half
    (message_id,) = loopback.grid.push_messages([request(0, size=len(data))])
    message = client.message()
    assert len(message.content["data"]["bytes"].data) == len(data)
    client.answer(message, data)
    client.hear("received")
    (reply,) = loopback.grid.pull_messages([message_id])
    assert data_of(reply) == data


def test_no_message_is_no_wait(loopback) -> None:
    assert loopback.grid.send_and_receive([]) == []


def test_a_message_waits_for_a_client_that_is_away(loopback) -> None:
    result = sent(loopback, 0)
    client = loopback.ready("hospital-a")
    client.answer(client.message(), b"here")
    assert data_of(result()[0]) == b"here"


def test_after_the_timeout_the_answers_at_hand_are_the_result(loopback) -> None:
    quick, slow = loopback.ready("hospital-a"), loopback.ready("hospital-b")
    result = sent(loopback, 0, 1, 2, timeout=0.5)
    quick.answer(quick.message())
    asked = slow.message()
    assert [reply.metadata.src_node_id for reply in result()] == [1]
    assert loopback.grid.busy() == {1}  # the third was never asked
    slow.answer(asked)
    assert slow.hear("received").message_id == asked.metadata.message_id
    assert loopback.grid.busy() == set()
    assert loopback.grid.counts() == {"late": 1}


def test_a_withdrawn_request_is_not_sent_any_more(loopback) -> None:
    assert loopback.grid.send_and_receive([request(0, 1)], timeout=0.05) == []
    client = loopback.ready("hospital-a")
    loopback.grid.push_messages([request(0, 2)])
    assert client.message().metadata.group_id == "2"
    assert loopback.grid.busy() == set()


def test_a_client_is_not_busy_once_its_connection_has_ended(loopback) -> None:
    client = loopback.ready("hospital-a")
    result = sent(loopback, 0, timeout=0.2)
    asked = client.message()
    assert result() == []
    assert loopback.grid.busy() == {0}
    client.close()
    wait_until(lambda: loopback.grid.busy() == set())
    again = loopback.ready("hospital-a", received=[asked.metadata.message_id])
    assert loopback.grid.busy() == {0}  # it says that it still has the request
    again.answer(asked)
    again.hear("received")
    assert loopback.grid.busy() == set()


def test_a_second_answer_and_one_to_an_earlier_server_are_dropped(loopback) -> None:
    client = loopback.ready("hospital-a")
    result = sent(loopback, 0)
    asked = client.message()
    client.answer(asked, b"first")
    client.answer(asked, b"second")
    client.send(*cut(pb.ClientFrame, "0123-1", b"of another life"))
    for expected in (asked.metadata.message_id, asked.metadata.message_id, "0123-1"):
        assert client.hear("received").message_id == expected
    assert data_of(result()[0]) == b"first"
    assert loopback.grid.counts() == {"duplicate": 1, "unknown": 1}


def test_an_answer_to_another_clients_request_is_dropped(loopback) -> None:
    asked, other = loopback.ready("hospital-a"), loopback.ready("hospital-b")
    result = sent(loopback, 0)
    message = asked.message()
    other.answer(message, b"not mine to give")
    other.hear("received")
    asked.answer(message, b"mine")
    assert [data_of(reply) for reply in result()] == [b"mine"]


def test_after_a_reconnect_the_same_request_comes_again(loopback) -> None:
    result = sent(loopback, 0)
    first = loopback.ready("hospital-a")
    asked = first.message()
    first.close()
    wait_until(lambda: loopback.grid.connected() == [])
    second = loopback.ready("hospital-a")
    again = second.message()
    assert again.metadata.message_id == asked.metadata.message_id
    second.answer(again, b"done")
    assert data_of(result()[0]) == b"done"
    assert loopback.grid.connections() == {0: 2}


def test_a_request_that_the_client_has_is_not_sent_again(loopback) -> None:
    result = sent(loopback, 0)
    first = loopback.ready("hospital-a")
    asked = first.message()
    first.close()
    wait_until(lambda: loopback.grid.connected() == [])
    second = loopback.ready("hospital-a", received=[asked.metadata.message_id])
    second.answer(asked, b"had it")
    second.hear("received")  # and not Begin
    assert data_of(result()[0]) == b"had it"


def test_slow_clients_do_not_hold_up_the_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fleet, "SENDERS", 1)
    loopback = Loopback(tmp_path)
    slow, quick = loopback.ready("hospital-a"), loopback.ready("hospital-b")
    size = 50 * CHUNK_BYTES  # more than the network holds
    messages = [request(0, size=size), request(1)]
    _, message_id = loopback.grid.push_messages(messages)
    quick.answer(quick.message())
    quick.hear("received")
    assert len(loopback.grid.pull_messages([message_id])) == 1
    slow.close()
    loopback.close()


# --- refusals ---------------------------------------------------------------------

Misdeed = Callable[[Loopback], HandMade]


def _unknown(loopback: Loopback) -> HandMade:
    client = loopback.by_hand("stranger")
    client.say(hello=client.hello())
    return client


def _from_the_future(loopback: Loopback) -> HandMade:
    client = loopback.by_hand("hospital-b")
    client.say(hello=client.hello(protocol=pb.Protocol(major=2)))
    return client


def _other_plan(loopback: Loopback) -> HandMade:
    client = loopback.by_hand("hospital-b")
    client.say(hello=client.hello())
    client.hear("welcome")
    client.say(ready=pb.Ready(accepted="another\nplan"))
    return client


def _no_place(loopback: Loopback) -> HandMade:
    loopback.allow(*NAMES, "hospital-d")
    client = loopback.by_hand("hospital-d")
    client.say(hello=client.hello())
    return client


def _after_ready(*frames: pb.ClientFrame | bytes) -> Misdeed:
    def act(loopback: Loopback) -> HandMade:
        client = loopback.ready("hospital-b")
        for frame in frames:
            data = frame if isinstance(frame, bytes) else frame.SerializeToString()
            client.send(data)
        return client

    return act


def _before_hello(frame: bytes) -> Misdeed:
    def act(loopback: Loopback) -> HandMade:
        client = loopback.by_hand("hospital-b")
        client.send(frame)
        return client

    return act


def _begin(size: int, message_id: str = "1") -> pb.ClientFrame:
    return pb.ClientFrame(begin=pb.Begin(message_id=message_id, size=size))


def _chunk(size: int) -> pb.ClientFrame:
    return pb.ClientFrame(chunk=pb.Chunk(data=b"!" * size))


MISDEEDS: dict[str, tuple[str, Misdeed]] = {
    "not on the list": ("unknown-client", _unknown),
    "a protocol of the future": ("protocol-version", _from_the_future),
    "another plan": ("plan-not-accepted", _other_plan),
    "one client too many": ("no-slot", _no_place),
    "a GiB announced": ("too-large", _after_ready(_begin(1 << 30))),
    "no Hello": ("invalid-frame", _before_hello(_begin(1).SerializeToString())),
    "an empty frame": ("invalid-frame", _before_hello(b"")),
    "garbage": ("invalid-frame", _after_ready(b"\xff\x00 garbage")),
    "Hello twice": ("invalid-frame", _after_ready(pb.ClientFrame(hello=pb.Hello()))),
    "Ready twice": ("invalid-frame", _after_ready(pb.ClientFrame(ready=pb.Ready()))),
    "a message of no size": ("invalid-frame", _after_ready(_begin(0))),
    "a message of no id": ("invalid-frame", _after_ready(_begin(1, ""))),
    "an endless id": ("invalid-frame", _after_ready(_begin(1, 65 * "i"))),
    "two messages at once": ("invalid-frame", _after_ready(_begin(2), _begin(2))),
    "a chunk of nothing": ("invalid-frame", _after_ready(_chunk(1))),
    "an empty chunk": ("invalid-frame", _after_ready(_begin(2), _chunk(0))),
    "more than announced": ("invalid-frame", _after_ready(_begin(2), _chunk(3))),
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_misdeed_is_refused_in_one_line_and_disturbs_nobody(
    loopback, caplog, misdeed
) -> None:
    code, act = MISDEEDS[misdeed]
    good = loopback.ready("hospital-a")
    result = sent(loopback, 0)
    asked = good.message()
    with caplog.at_level(logging.WARNING):
        bad = act(loopback)
        refusal = bad.hear("refusal")
        assert bad.is_over()
    assert refusal.code == code
    assert loopback.grid.counts() == {code: 1}
    (line,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"code={code}" in line.getMessage()
    assert "\n" not in line.getMessage()
    assert (line.run, line.code) == (loopback.proposal.run, code)
    good.answer(asked, b"undisturbed")
    assert data_of(result()[0]) == b"undisturbed"


@pytest.mark.parametrize("minor", [0, 1])
def test_one_minor_version_apart_works(loopback, minor) -> None:
    client = loopback.by_hand("hospital-a")
    client.say(hello=client.hello(protocol=pb.Protocol(major=1, minor=minor)))
    assert client.hear("welcome").client == 0


def test_two_minor_versions_apart_are_refused(loopback) -> None:
    client = loopback.by_hand("hospital-a")
    client.say(hello=client.hello(protocol=pb.Protocol(major=1, minor=2)))
    assert client.hear("refusal").code == "protocol-version"


def test_a_client_that_connects_anew_takes_its_own_place(loopback) -> None:
    first = loopback.ready("hospital-a")
    result = sent(loopback, 0)
    first.message()
    second = loopback.ready("hospital-a")
    assert first.hear("refusal").code == "superseded"
    assert first.is_over()
    second.answer(second.message(), b"second")
    assert data_of(result()[0]) == b"second"
    assert loopback.grid.connected() == ["hospital-a"]


@pytest.mark.parametrize(
    "content",
    [b"no message", to_bytes(reply_to(request(1)))],
    ids=["garbage", "of another client"],
)
def test_an_answer_that_is_none_is_refused_and_not_asked_for_again(
    loopback, content
) -> None:
    client = loopback.ready("hospital-a")
    result = sent(loopback, 0)
    message_id = client.message().metadata.message_id
    client.send(*cut(pb.ClientFrame, message_id, content))
    assert client.hear("refusal").code == "invalid-frame"
    (reply,) = result()
    assert reply.metadata.src_node_id == 1
    assert reply.error.reason.startswith("invalid answer: Expected")
    again = loopback.ready("hospital-a")
    loopback.grid.push_messages([request(0, 2)])
    assert again.message().metadata.group_id == "2"


def test_a_message_of_countless_fields_holds_up_nobody(loopback) -> None:
    good, bad = loopback.ready("hospital-a"), loopback.ready("hospital-b")
    result = sent(loopback, 1)
    asked = bad.message()
    bomb = ProtoMessage.FromString(to_bytes(reply_to(asked)))
    for number in range(200_000):
        bomb.content.items.add(key=str(number)).array_record.SetInParent()
    frames = [*cut(pb.ClientFrame, asked.metadata.message_id, bomb.SerializeToString())]
    started = time.monotonic()
    bad.send(*frames)
    assert bad.hear("refusal").code == "invalid-frame"
    assert result()[0].has_error()
    assert time.monotonic() - started < 1  # to parse it would take 2 s
    (message_id,) = loopback.grid.push_messages([request(0)])
    good.answer(good.message())
    wait_until(lambda: loopback.grid.pull_messages([message_id]))


def test_an_answer_withdrawn_while_it_is_read_is_late(loopback, monkeypatch) -> None:
    entered, opened = threading.Event(), threading.Event()

    def slowly(data: bytearray) -> Message:
        entered.set()
        assert opened.wait(20)
        return read_message(data)

    monkeypatch.setattr(mailbox, "read_message", slowly)
    client = loopback.ready("hospital-a")
    result = sent(loopback, 0, timeout=0.5)
    client.answer(client.message())
    assert entered.wait(20)
    assert result() == []  # the event loop goes on
    opened.set()
    client.hear("received")
    assert loopback.grid.counts() == {"late": 1}


def test_a_client_may_not_answer_for_ever_what_nobody_asked(loopback, caplog) -> None:
    caplog.set_level(logging.INFO)
    client = loopback.ready("hospital-a")
    for number in range(fleet.UNASKED_ANSWERS):
        client.send(*cut(pb.ClientFrame, f"0123-{number}", b"!"))
    for _ in range(fleet.UNASKED_ANSWERS - 1):
        client.hear("received")
    assert client.hear("refusal").code == "invalid-frame"
    assert loopback.grid.counts() == {"unknown": 100, "invalid-frame": 1}
    assert "answer dropped" not in caplog.text


def test_of_three_streams_that_only_look_the_oldest_ends(loopback) -> None:
    working = loopback.ready("hospital-a")
    looking = [loopback.by_hand("hospital-a") for _ in range(4)]
    for client in looking:
        client.say(hello=client.hello())
        client.hear("welcome")
    for client in looking[:2]:
        assert client.hear("refusal").code == "superseded"
        assert client.is_over()
    looking[3].say(heartbeat=pb.Heartbeat())
    (message_id,) = loopback.grid.push_messages([request(0)])
    working.answer(working.message())
    wait_until(lambda: loopback.grid.pull_messages([message_id]))
    looking[2].say(ready=pb.Ready(accepted=loopback.proposal.hash))
    assert working.hear("received")
    assert working.hear("refusal").code == "superseded"


@pytest.mark.parametrize("word", ["\x1b[2J\n" * 50, "\N{PILE OF POO}" * 1000])
def test_what_a_client_writes_is_plain_and_short_in_the_log(
    loopback, caplog, word
) -> None:
    client = loopback.by_hand("hospital-b")
    client.say(hello=client.hello())
    client.hear("welcome")
    client.say(ready=pb.Ready(accepted=word))
    client.hear("refusal")
    stranger = loopback.by_hand(word)
    stranger.say(hello=stranger.hello())
    stranger.hear("refusal")
    lines = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(lines) == 2
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert max(map(len, lines)) < 400


def test_a_revoked_client_is_out_at_its_next_heartbeat(loopback, caplog) -> None:
    client = loopback.ready("hospital-a")
    client.say(heartbeat=pb.Heartbeat())
    loopback.allow("hospital-b")
    client.say(heartbeat=pb.Heartbeat())
    assert client.hear("refusal").code == "unknown-client"
    assert client.is_over()
    wait_until(lambda: loopback.grid.connected() == [])
    assert "client=hospital-a code=unknown-client" in caplog.text


# --- silence, floods, the end -----------------------------------------------------


def test_a_stream_without_hello_ends(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(fleet, "HELLO_SECONDS", 0.2)
    loopback = Loopback(tmp_path)
    client = loopback.by_hand("hospital-a")
    assert client.is_over()
    assert "silent for too long" in caplog.text
    loopback.close()


def test_three_missed_heartbeats_end_a_stream(tmp_path) -> None:
    loopback = Loopback(tmp_path, heartbeat_seconds=0.1)
    client = loopback.ready("hospital-a")
    for _ in range(5):
        time.sleep(0.1)
        client.say(heartbeat=pb.Heartbeat())
    assert loopback.grid.connected() == ["hospital-a"]
    started = time.monotonic()
    assert client.is_over()
    assert 0.2 < time.monotonic() - started < 2
    assert loopback.grid.connected() == []
    loopback.close()


def test_a_client_that_reads_nothing_loses_its_stream(tmp_path) -> None:
    loopback = Loopback(tmp_path, heartbeat_seconds=0.2)
    client = loopback.ready("hospital-a")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            client.say(heartbeat=pb.Heartbeat())

    beating = threading.Thread(target=beat)
    beating.start()
    loopback.grid.push_messages([request(0, size=100 * CHUNK_BYTES)])
    wait_until(lambda: loopback.grid.connected() == [])
    stop.set()
    beating.join()
    client.close()
    loopback.close()


def test_a_frame_longer_than_a_chunk_is_not_read(loopback) -> None:
    client = loopback.ready("hospital-a")
    client.send(b"!" * (FRAME_BYTES + 1))
    with pytest.raises(grpc.RpcError) as caught:
        next(client.call)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    wait_until(lambda: loopback.grid.connected() == [])


def test_compressed_frames_are_not_unpacked(loopback) -> None:
    gzip = [("grpc.default_compression_algorithm", grpc.Compression.Gzip.value)]
    client = loopback.by_hand("hospital-a", options=gzip)
    client.say(hello=client.hello(software="0" * 10_000))
    with pytest.raises(grpc.RpcError) as caught:
        next(client.call)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_at_the_end_clients_are_told_so(loopback) -> None:
    clients = [loopback.ready(name) for name in NAMES]
    closing = threading.Thread(target=loopback.close, kwargs={"finished": True})
    closing.start()
    for client in clients:
        client.hear("finished")
        client.close()
    closing.join(10)
    assert not closing.is_alive()


def test_a_close_ends_waits_and_leaves_no_thread_and_no_socket(tmp_path) -> None:
    before = set(threading.enumerate())
    loopback = Loopback(tmp_path)
    result = sent(loopback, 0)
    time.sleep(0.1)
    loopback.close()
    assert result() == []
    wait_until(lambda: set(threading.enumerate()) <= before)
    with contextlib.closing(socket.socket()) as probe:
        assert probe.connect_ex(("127.0.0.1", loopback.port)) != 0


def test_a_close_with_many_clients_there_is_no_error(tmp_path, caplog) -> None:
    names = tuple(f"site-{number}" for number in range(40))
    loopback = Loopback(tmp_path, places=len(names), names=names)
    clients = [loopback.ready(name) for name in names]
    loopback.close()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    for client in clients:
        client.close()


def test_a_grid_may_be_closed_before_its_start_and_twice(loopback) -> None:
    grid = GrpcGrid(
        loopback.section,
        loopback.proposal,
        loopback.allow_list,
        loopback.slots,
        1000,
    )
    grid.close(finished=True)
    assert grid.connected() == []
    with pytest.raises(RunError, match="that was started"):
        grid.send_and_receive([request(0)])
    loopback.close()
    loopback.close()


def test_an_address_in_use_is_one_line(loopback) -> None:
    address = f"127.0.0.1:{loopback.port}"
    grid = GrpcGrid(
        loopback.section.model_copy(update={"address": address}),
        loopback.proposal,
        loopback.allow_list,
        loopback.slots,
        1000,
    )
    with pytest.raises(RunError, match=f"Cannot listen at {address}: is another"):
        grid.start()
    grid.close(finished=False)
