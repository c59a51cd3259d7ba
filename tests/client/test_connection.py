"""``run_client`` against a real grid, a proxy that cuts, and servers made by hand."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from flwr.app import Message

from client import connection
from client import fleet_pb2 as pb
from client.agreement import Proposal
from client.connection import run_client
from client.flower import set_message_id, to_bytes
from client.settings import ClientSection
from client.stream import refused
from client.wire import Refused, cut, our_protocol
from fedpeft.errors import ConfigError, RunError
from tests.proxy import Proxy
from tests.transport import (
    RUN,
    Loopback,
    Runner,
    Server,
    data_of,
    make_keys,
    reply_to,
    request,
    wait_until,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(connection, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(connection, "STOP_SECONDS", 0.02)


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    loopback = Loopback(tmp_path)
    yield loopback
    loopback.close()


class Gate:
    """A handler that waits until the test opens it."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self, message: Message, client: int) -> Message:
        self.calls += 1
        self.entered.set()
        assert self.opened.wait(20)
        return reply_to(message, f"answer {self.calls}".encode())


def replies_to(loopback: Loopback, message_id: str) -> list[Message]:
    replies: list[Message] = []

    def arrived() -> bool:
        replies.extend(loopback.grid.pull_messages([message_id]))
        return bool(replies)

    wait_until(arrived)
    return replies


def test_clients_answer_until_the_run_is_complete(loopback) -> None:
    runners = [
        Runner(loopback.client_section(name)) for name in ("hospital-b", "hospital-a")
    ]
    for server_round in (1, 2, 3):
        messages = [request(client, server_round) for client in (0, 1)]
        replies = loopback.grid.send_and_receive(messages, timeout=20)
        assert sorted(map(data_of, replies)) == [b"of 0", b"of 1"]
    loopback.close(finished=True)
    for runner, client in zip(runners, (1, 0), strict=True):
        runner.join()
        assert runner.agreed == [(loopback.proposal, client)]
        assert runner.handled == [("1", client), ("2", client), ("3", client)]


def test_everything_works_over_mutual_tls(tmp_path) -> None:
    loopback = Loopback(tmp_path, (tmp_path / "keys", make_keys(tmp_path / "keys")))
    runner = Runner(loopback.client_section("hospital-c"))
    (reply,) = loopback.grid.send_and_receive([request(2, size=3 << 20)], timeout=20)
    assert data_of(reply) == b"of 2"
    loopback.close(finished=True)
    runner.join()


def test_an_answer_finished_while_the_connection_is_cut_arrives_once(loopback) -> None:
    proxy, gate = Proxy(loopback.port), Gate()
    section = loopback.client_section("hospital-a", server=f"127.0.0.1:{proxy.port}")
    runner = Runner(section, handle=gate)
    (message_id,) = loopback.grid.push_messages([request(0)])
    gate.entered.wait(20)
    proxy.cut()
    wait_until(lambda: loopback.grid.connections() == {0: 2})
    proxy.cut()
    gate.opened.set()
    (reply,) = replies_to(loopback, message_id)
    assert data_of(reply) == b"answer 1"
    assert gate.calls == 1
    assert len(runner.agreed) == 1
    loopback.close(finished=True)
    runner.join()
    proxy.close()


def test_an_answer_cut_in_the_middle_of_a_chunk_is_sent_again_whole(loopback) -> None:
    proxy = Proxy(loopback.port)
    data = bytes(range(256)) * (1 << 14)  # 4 MiB

    def handle(message: Message, client: int) -> Message:
        proxy.cut_after(len(data) * 5 // 8, "up")
        runner.handled.append((message.metadata.group_id, client))
        return reply_to(message, data)

    section = loopback.client_section("hospital-a", server=f"127.0.0.1:{proxy.port}")
    runner = Runner(section, handle=handle)
    (message_id,) = loopback.grid.push_messages([request(0)])
    (reply,) = replies_to(loopback, message_id)
    assert data_of(reply) == data
    assert runner.handled == [("1", 0)]
    assert loopback.grid.connections() == {0: 2}
    assert loopback.grid.counts() == {}
    loopback.close(finished=True)
    runner.join()
    proxy.close()


def test_a_server_started_anew_asks_again_and_drops_the_old_answer(tmp_path) -> None:
    first, gate = Loopback(tmp_path), Gate()
    runner = Runner(first.client_section("hospital-a"), handle=gate)
    first.grid.push_messages([request(0)])
    gate.entered.wait(20)
    first.close()
    second = Loopback(tmp_path, port=first.port)
    (message_id,) = second.grid.push_messages([request(0)])
    wait_until(lambda: second.grid.connected() == ["hospital-a"])
    gate.opened.set()
    (reply,) = replies_to(second, message_id)
    assert data_of(reply) == b"answer 2"
    assert second.grid.counts() == {"unknown": 1}
    assert len(runner.agreed) == 1  # the same proposal
    second.close(finished=True)
    runner.join()


def test_heartbeats_go_on_while_a_client_agrees_and_works(tmp_path) -> None:
    loopback, gate = Loopback(tmp_path, heartbeat_seconds=0.1), Gate()
    waits = threading.Event()
    runner = Runner(
        loopback.client_section("hospital-a"),
        agree=lambda proposal, client: waits.wait(0.8),
        handle=gate,
    )
    (message_id,) = loopback.grid.push_messages([request(0)])
    gate.entered.wait(20)
    time.sleep(0.8)
    gate.opened.set()
    replies_to(loopback, message_id)
    assert loopback.grid.connections() == {0: 1}
    loopback.close(finished=True)
    runner.join()


def test_a_refusal_ends_the_client_with_its_code(loopback) -> None:
    with pytest.raises(RunError, match=r"refused this client \(unknown-client\)") as e:
        Runner(loopback.client_section("stranger")).join()
    assert e.value.code == "unknown-client"
    assert "\n" not in str(e.value)


def test_a_client_may_refuse_the_proposal(loopback) -> None:
    def agree(proposal: object, client: int) -> None:
        raise RunError("Expected another plan.")

    with pytest.raises(RunError, match="another plan"):
        Runner(loopback.client_section("hospital-a"), agree=agree).join()
    assert loopback.grid.connections() == {}


def test_what_a_handler_raises_ends_the_client(loopback) -> None:
    def handle(message: Message, client: int) -> Message:
        raise RuntimeError("a bug")

    runner = Runner(loopback.client_section("hospital-a"), handle=handle)
    loopback.grid.push_messages([request(0)])
    with pytest.raises(RuntimeError, match="a bug"):
        runner.join()


def test_a_second_process_of_a_client_ends_the_first(loopback) -> None:
    first = Runner(loopback.client_section("hospital-a"))
    wait_until(lambda: loopback.grid.connected())
    second = Runner(loopback.client_section("hospital-a"))
    with pytest.raises(Refused, match="superseded"):
        first.join()
    second.stop.set()
    second.join()


def test_a_client_that_is_told_to_stop_answers_first(loopback) -> None:
    gate = Gate()
    runner = Runner(loopback.client_section("hospital-a"), handle=gate)
    message_ids = loopback.grid.push_messages([request(0, 1), request(0, 2)])
    gate.entered.wait(20)
    runner.stop.set()
    time.sleep(0.1)
    gate.opened.set()
    runner.join()
    assert gate.calls == 1
    assert len(loopback.grid.pull_messages(message_ids)) == 1


@pytest.mark.parametrize("server", ["there", "away"])
def test_an_idle_client_stops_at_once(loopback, server) -> None:
    if server == "away":
        loopback.close()
    runner = Runner(loopback.client_section("hospital-a"))
    time.sleep(0.3)
    started = time.monotonic()
    runner.stop.set()
    runner.join()
    assert time.monotonic() - started < 1


def test_pauses_double_up_to_the_longest_and_are_never_the_same(
    loopback, caplog
) -> None:
    loopback.close()
    runner = Runner(loopback.client_section("hospital-a"))
    wait_until(lambda: len(caplog.records) >= 6)
    runner.stop.set()
    runner.join()
    lines = [r for r in caplog.records if "connection lost" in r.getMessage()]
    assert all(r.client == "hospital-a" for r in lines)
    assert "UNAVAILABLE" in lines[0].getMessage()
    steps = [r.created - q.created for q, r in pairwise(lines)]
    for step, longest in zip(steps, (0.05, 0.1, 0.2, 0.2, 0.2), strict=False):
        assert longest / 2 <= step < longest + 0.1


def test_keys_are_read_anew_for_every_connection(tmp_path) -> None:
    keys = tmp_path / "keys", make_keys(tmp_path / "keys")
    loopback = Loopback(tmp_path, keys)
    proxy = Proxy(loopback.port)
    section = loopback.client_section("hospital-a", server=f"127.0.0.1:{proxy.port}")
    runner = Runner(section)
    wait_until(lambda: loopback.grid.connected())
    key = keys[0] / "hospital-a.key"
    key.rename(tmp_path / "key")
    proxy.cut()
    wait_until(lambda: not loopback.grid.connected())
    time.sleep(0.3)  # it tries, and goes on without its key
    assert runner.is_alive
    (tmp_path / "key").rename(key)
    wait_until(lambda: loopback.grid.connected())
    runner.stop.set()
    runner.join()
    proxy.close()
    loopback.close()


def test_keys_that_cannot_be_used_are_an_error_at_the_start(tmp_path) -> None:
    section = ClientSection(
        server="127.0.0.1:1",
        name="hospital-a",
        state=tmp_path,
        certificate=tmp_path / "none.crt",
        key=tmp_path / "none.key",
        ca=tmp_path / "ca.crt",
    )
    with pytest.raises(ConfigError, match="none"):
        run_client(section, lambda *_: None, lambda message, _: message)


def test_a_later_proposal_that_makes_no_sense_ends_the_client(tmp_path) -> None:
    loopback = Loopback(tmp_path)

    def agree(proposal: Proposal, index: int) -> None:
        if proposal != loopback.proposal:
            raise ConfigError("Expected another proposal.")

    runner = Runner(loopback.client_section("hospital-a"), agree=agree)
    wait_until(lambda: loopback.grid.connected())
    loopback.close()
    other = Loopback(tmp_path, places=4, port=loopback.port)
    with pytest.raises(ConfigError, match="another proposal"):
        runner.join()
    other.close()


def test_who_only_looks_at_the_proposal_disturbs_nobody(tmp_path) -> None:
    loopback = Loopback(tmp_path)
    working = loopback.ready("hospital-a")
    looking = loopback.by_hand("hospital-a")
    looking.say(hello=looking.hello())
    looking.hear("welcome")
    looking.close()
    (message_id,) = loopback.grid.push_messages([request(0)])
    working.answer(working.message())
    wait_until(lambda: loopback.grid.pull_messages([message_id]))
    working.close()
    loopback.close()


# --- servers that misbehave ---------------------------------------------------------


def welcome(**changes: object) -> pb.ServerFrame:
    facts = {
        "protocol": our_protocol(),
        "run": RUN,
        "toml": "",
        "backbone": "backbone",
        "heartbeat_seconds": 1.0,
    }
    return pb.ServerFrame(welcome=pb.Welcome(**{**facts, **changes}))


def begin(size: int) -> pb.ServerFrame:
    return pb.ServerFrame(begin=pb.Begin(message_id="1", size=size))


BAD = {
    "an old protocol": ([welcome(protocol=pb.Protocol(major=0))], "protocol-version"),
    "an endless heartbeat": ([welcome(heartbeat_seconds=1e9)], "invalid-frame"),
    "no heartbeat": ([welcome(heartbeat_seconds=float("nan"))], "invalid-frame"),
    "no Welcome": ([begin(1)], "invalid-frame"),
    "Welcome twice": ([welcome(), welcome()], "invalid-frame"),
    "garbage": ([welcome(), b"\xff\xff"], "invalid-frame"),
    "too long a request": ([welcome(), begin(1 << 20)], "too-large"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_server_that_makes_no_sense_is_left(tmp_path, case) -> None:
    frames, code = BAD[case]

    def script(heard: Iterator[pb.ClientFrame]) -> Iterator[pb.ServerFrame]:
        next(heard)
        yield from frames
        list(heard)

    server = Server(script)
    section = ClientSection(
        server=f"127.0.0.1:{server.port}",
        name="hospital-a",
        state=tmp_path,
        insecure=True,
        max_message_bytes=1 << 16,
    )
    with pytest.raises(Refused) as caught:
        Runner(section, agree=lambda *_: time.sleep(0.3)).join()
    assert caught.value.code == code
    server.close()


def test_a_request_that_comes_twice_is_handled_once(loopback, tmp_path) -> None:
    message = request(0)
    set_message_id(message, "the-same")
    heard_answers: list[str] = []

    def script(heard: Iterator[pb.ClientFrame]) -> Iterator[pb.ServerFrame]:
        next(heard)
        yield welcome(toml=loopback.proposal.toml)
        while next(heard).WhichOneof("kind") != "ready":
            pass
        for _ in range(3):
            frames = cut(pb.ServerFrame, "the-same", to_bytes(message))
            yield from (pb.ServerFrame.FromString(frame) for frame in frames)
        for frame in heard:
            if frame.WhichOneof("kind") == "begin":
                heard_answers.append(frame.begin.message_id)
                time.sleep(0.2)
                yield pb.ServerFrame(finished=pb.Finished())

    server = Server(script)
    address = f"127.0.0.1:{server.port}"
    runner = Runner(loopback.client_section("hospital-a", server=address))
    runner.join()
    assert runner.handled == [("1", 0)]
    assert heard_answers == ["the-same"]
    server.close()


def play(
    loopback: Loopback, requests: Iterable[tuple[str, bytes]]
) -> tuple[Server, Runner]:
    """Has a client answer a server that sends these and acknowledges nothing."""

    def script(heard: Iterator[pb.ClientFrame]) -> Iterator[pb.ServerFrame]:
        next(heard)
        yield welcome(toml=loopback.proposal.toml)
        while next(heard).WhichOneof("kind") != "ready":
            pass
        for message_id, data in requests:
            for frame in cut(pb.ServerFrame, message_id, data):
                yield pb.ServerFrame.FromString(frame)
        list(heard)

    server = Server(script)
    address = f"127.0.0.1:{server.port}"
    return server, Runner(loopback.client_section("hospital-a", server=address))


def test_a_request_that_is_no_message_is_refused(loopback) -> None:
    server, runner = play(loopback, [("a-1", b"no message")])
    with pytest.raises(Refused, match="Expected a message") as caught:
        runner.join()
    assert caught.value.code == "invalid-frame"
    assert runner.handled == []
    server.close()


def test_a_server_that_acknowledges_nothing_is_left(loopback) -> None:
    data = to_bytes(request(0))
    server, runner = play(loopback, ((f"a-{number}", data) for number in range(100)))
    with pytest.raises(Refused, match="at most 32 requests whose answers"):
        runner.join()
    assert len(runner.handled) <= connection.HELD_REQUESTS
    server.close()


def test_a_refusals_reason_is_one_short_line_that_no_terminal_obeys() -> None:
    refusal = pb.Refusal(code="\x1b[2J", reason="\n\x1b]0;" + "!" * 1000)
    error = refused(pb.ServerFrame(refusal=refusal), "refusal")
    assert str(error).isprintable()
    assert len(str(error)) < 400


def test_log_lines_name_client_and_run(loopback, caplog) -> None:
    caplog.set_level(logging.INFO)
    runner = Runner(loopback.client_section("hospital-a"))
    wait_until(lambda: loopback.grid.connected())
    loopback.close(finished=True)
    runner.join()
    ours = [r for r in caplog.records if r.name == "client.connection"]
    assert [r.run for r in ours] == [RUN, RUN]
    assert "connected server=127.0.0.1" in ours[0].getMessage()
    assert "the run is complete" in ours[1].getMessage()
