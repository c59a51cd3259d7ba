"""Whatever befalls server or clients, the run ends as if nothing had.

Real processes, killed at exact places and started again, as a supervisor would.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from fedpeft.errors import DataError
from fedpeft.privacy import data_sources, verify
from tests.deploy.federation import Command, Federation, Outcome, wait_until
from tests.proxy import Direction, Proxy

pytestmark = pytest.mark.slow

PAIR = ("north", "east")
QUICK = (
    "cohort.size=2",
    "data.max_length=8",
    "data.test_fraction=0.05",
    "run.evaluate_every=99",
)
KILLED = -signal.SIGKILL

Pair = Callable[..., Federation]


@pytest.fixture
def pair(federation: Callable[..., Federation]) -> Pair:
    """Makes federations of two clients, both of which each of three rounds asks."""

    def make(*overrides: str, **server: object) -> Federation:
        return federation(*QUICK, *overrides, names=PAIR, **server)

    return make


@pytest.fixture(scope="module")
def undisturbed(
    small_reviews: Path, key_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What the run comes to if nothing befalls it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    one = Federation(folder, small_reviews, key_folder, *QUICK, names=PAIR)
    try:
        _finish(_serve(one), *(one.client(name) for name in PAIR))
        outcome = Outcome.of(one)
    finally:
        one.close()
    assert outcome.rounds == 3
    assert outcome.releases == {"north": [1, 2, 3], "east": [1, 2, 3]}
    return outcome


def _serve(one: Federation, place: str | None = None) -> Command:
    """Starts a server and waits until clients can reach it."""
    server = one.server(place)
    server.says("Listening")
    return server


def _finish(*commands: Command) -> None:
    for command in commands:
        command.ends()


def _traces(one: Federation, name: str) -> tuple[int, int, int]:
    """How many answers a client's outbox, ledger and head speak of."""
    state = one.state(name)
    (source,) = data_sources(state)
    ledger = state / "ledger" / f"{source}.jsonl"
    head = state / "heads" / f"{source}.json"
    answers = len(list((state / "outbox" / source).glob("*.safetensors")))
    length = json.loads(head.read_bytes())["length"] if head.exists() else 0
    return answers, ledger.read_bytes().count(b"\n"), length


# Each in round 2; and the outbox, the ledger and its head at that moment.
CLIENT_DIES: dict[str, tuple[str, tuple[int, int, int]]] = {
    "training": ("fedpeft.privacy.draws:Draws.noise@3", (1, 1, 1)),
    "writing-its-answer": (
        "fedpeft.privacy.outbox:write_atomically@2>os:replace@1",
        (1, 1, 1),
    ),
    "between-outbox-and-ledger": ("fedpeft.privacy.outbox:Outbox.put@2+", (2, 1, 1)),
    "between-ledger-and-head": (
        "fedpeft.privacy.ledger:Ledger.write_head@2",
        (2, 2, 1),
    ),
    "amid-the-frames-of-its-answer": ("client.wire:pb.Chunk@2", (2, 2, 2)),
}


@pytest.mark.parametrize("moment", CLIENT_DIES)
def test_a_client_killed_at_any_moment_answers_once(
    moment: str, pair: Pair, undisturbed: Outcome
) -> None:
    place, traces = CLIENT_DIES[moment]
    one = pair()
    server, east = _serve(one), one.client("east")
    one.client("north", place).ends(KILLED)
    assert _traces(one, "north") == traces
    _finish(one.client("north"), server, east)
    Outcome.of(one).assert_equal(undisturbed)


def test_a_client_killed_before_the_acknowledgement_came_has_still_answered(
    pair: Pair, undisturbed: Outcome
) -> None:
    one = pair()
    server, east = _serve(one), one.client("east")
    # The seventh frame: after the welcome, a request of two, its receipt, and another.
    one.client("north", "client.stream:read_frame@7").ends(KILLED)
    wait_until(lambda: one.events() == 2, "the round that it had answered")
    _finish(one.client("north"), server, east)
    Outcome.of(one).assert_equal(undisturbed)


# Each in round 2; and the newest checkpoint, the events at that moment.
SERVER_DIES: dict[str, tuple[str, int, int]] = {
    "choosing-a-cohort": ("server.rounds:_cohort@2", 1, 1),
    "waiting-for-answers": ("server.mailbox:Mailbox.post@4+", 1, 1),
    "taking-in-an-answer": ("server.mailbox:Mailbox.answer@3", 1, 1),
    "aggregating": ("server.exchange:Update@3+", 1, 1),
    "writing-a-checkpoint": (
        "server.checkpoint:write_atomically@3>os:replace@1",
        1,
        1,
    ),
    "between-checkpoint-and-event": ("server.checkpoint:write_atomically@3+", 2, 1),
    "before-its-clients-know-of-the-end": ("server.app:write_atomically@3+", 3, 3),
}


@pytest.mark.parametrize("moment", SERVER_DIES)
def test_a_server_killed_at_any_moment_goes_on_from_there(
    moment: str, pair: Pair, undisturbed: Outcome
) -> None:
    place, checkpoint, events = SERVER_DIES[moment]
    one = pair()
    server = _serve(one, place)
    clients = [one.client(name) for name in PAIR]
    server.ends(KILLED)
    assert _checkpoints(one)[-1].name == f"round-{checkpoint:06d}.safetensors"
    assert one.events() == events
    _finish(one.server(), *clients)
    assert one.events() == 3
    Outcome.of(one).assert_equal(undisturbed)


def _checkpoints(one: Federation) -> list[Path]:
    return sorted((one.run / "checkpoint").glob("*.safetensors"))


def test_a_server_asked_to_stop_ends_its_round_and_goes_on_later(
    pair: Pair, undisturbed: Outcome
) -> None:
    one = pair()
    server, east = _serve(one), one.client("east")
    east.says("round=1 code=ok")
    server.send_signal(signal.SIGTERM)
    north = one.client("north")  # for which the round waited
    assert "Stopped after round 1 of 3" in server.ends()
    assert len(_checkpoints(one)) == 2
    assert one.events() == 1
    _finish(one.server(), north, east)
    Outcome.of(one).assert_equal(undisturbed)


def _ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_client_asked_to_stop_sends_the_answer_that_it_is_at(
    pair: Pair, undisturbed: Outcome
) -> None:
    one = pair()
    server, east = _serve(one), one.client("east")
    place = "fedpeft.privacy.draws:Draws.noise@3"
    one.client("north", place, action=_ask_to_stop).ends()
    assert _traces(one, "north") == (2, 2, 2)
    wait_until(lambda: one.events() == 2, "the round that it had answered")
    _finish(one.client("north"), server, east)
    Outcome.of(one).assert_equal(undisturbed)


@pytest.mark.parametrize(("noise", "lost"), [("seeded", 1), ("secure", 2)])
def test_a_server_restored_from_an_older_checkpoint_gets_the_same_answers(
    noise: str, lost: int, pair: Pair, undisturbed: Outcome
) -> None:
    one = pair(f"privacy.noise={noise}")
    server = _serve(one, "server.checkpoint:write_atomically@4")  # of round 3
    clients = [one.client(name) for name in PAIR]
    server.ends(KILLED)
    answered = {name: _payloads(one, name) for name in PAIR}
    for path in _checkpoints(one)[-lost:]:
        path.unlink()
    _finish(one.server(), *clients)
    outcome = Outcome.of(one)
    assert one.events() == outcome.rounds == 3
    assert answered == {name: _payloads(one, name) for name in PAIR}
    assert [len(payloads) for payloads in answered.values()] == [3, 3]
    if noise == "seeded":
        outcome.assert_equal(undisturbed)


def _payloads(one: Federation, name: str) -> list[str]:
    """The hashes of all that a client has released."""
    (source,) = data_sources(one.state(name))
    return [entry.payload_hash for entry in verify(one.state(name), source).entries]


def _fail_to_read() -> None:
    raise DataError("The records cannot be read at the moment.")


def test_a_round_that_became_another_one_is_not_answered_again(pair: Pair) -> None:
    one = pair("privacy.noise=secure", "cohort.min_reply_share=0.5")
    server = _serve(one, "server.checkpoint:write_atomically@3")  # of round 2
    # East has no answer to round 1: round 2 begins where north's alone has led to.
    place = "client.answer:make_update@1"
    clients = [one.client("north"), one.client("east", place, action=_fail_to_read)]
    server.ends(KILLED)
    newest, aside = _checkpoints(one)[-1], one.folder / "aside"
    newest.rename(aside)
    # Asked again, east has one, and round 2 begins elsewhere.
    assert "got 0 (2 request-conflict)" in one.server().ends(2)
    for client in clients:
        assert client.output().count("refused=request-conflict") == 1
    # With the checkpoint that was lost the run goes on as it was.
    for path in _checkpoints(one)[1:]:
        path.unlink()
    aside.rename(newest)
    _finish(one.server(), *clients)
    assert Outcome.of(one).releases == {"north": [1, 2, 3], "east": [2, 1, 3]}


def test_a_client_restored_from_a_backup_refuses_and_the_run_goes_on_without(
    pair: Pair,
) -> None:
    one = pair("run.rounds=6", "cohort.min_reply_share=0.5")
    server, east = _serve(one), one.client("east")
    state, backup = one.state("north"), one.folder / "backup"
    next_round = "client.answer:make_update@2"
    one.client("north", next_round).ends(KILLED)
    shutil.copytree(state, backup)  # of round 1
    one.client("north", next_round).ends(KILLED)
    assert _traces(one, "north") == (2, 2, 2)
    # The ledger alone is contradicted by its head.
    (source,) = data_sources(state)
    ledger = Path("ledger") / f"{source}.jsonl"
    shutil.copy(backup / ledger, state / ledger)
    found = one.start(["ledger", "verify", str(state)], "verify").ends(2)
    assert "Expected 2 entries" in found
    assert "restored from a backup" in found
    # All of it is whole by itself: only the server knows of round 2.
    shutil.rmtree(state)
    shutil.copytree(backup, state)
    one.start(["ledger", "verify", str(state)], "verify").ends()
    north = one.client("north")
    _finish(server, north, east)
    assert "refused=ledger-refused" in north.output()
    assert "restored from a backup" in north.output()
    refused = [record["codes"] for record in one.records()]
    assert refused == [{}, {}, *[{"ledger-refused": 1}] * 3, {}]
    said = (
        "client=north is set aside after 3 failures in a row, the last ledger-refused"
    )
    assert said in server.output()
    assert Outcome.of(one).releases == {"north": [1], "east": [1, 2, 3, 4, 5, 6]}
    adopt = ["ledger", "adopt", str(state), source, "--acknowledged", "2"]
    found = one.start(adopt, "adopt").ends()
    assert "kept 1 releases, charged 1 again" in found


@pytest.fixture
def proxied(pair: Pair) -> Iterator[Callable[[float], tuple[Federation, Proxy]]]:
    """Makes a federation whose north is behind a proxy."""
    proxies: list[Proxy] = []

    def make(heartbeat_seconds: float) -> tuple[Federation, Proxy]:
        one = pair(heartbeat_seconds=heartbeat_seconds)
        proxies.append(Proxy(one.port))
        address = f"127.0.0.1:{proxies[0].port}"
        one.write_client("north", "share = 0", server=address)
        return one, proxies[0]

    yield make
    for proxy in proxies:
        proxy.close()


# A request is 16 kB, an answer 1 kB, each in one chunk: the cut is within the next.
@pytest.mark.parametrize(("direction", "size"), [("down", 8000), ("up", 700)])
def test_a_connection_cut_amid_a_chunk_costs_nothing(
    direction: Direction, size: int, proxied: Callable, undisturbed: Outcome
) -> None:
    one, proxy = proxied(30.0)  # no heartbeat among the bytes that are counted
    server, north = _serve(one), one.client("north")
    north.says("round=1 code=ok")
    proxy.cut_after(size, direction)
    _finish(one.client("east"), server, north)
    assert proxy.has_cut
    assert proxy.connections == 2
    Outcome.of(one).assert_equal(undisturbed)


def test_a_connection_that_stalls_is_given_up_and_taken_up_anew(
    proxied: Callable, undisturbed: Outcome
) -> None:
    one, proxy = proxied(1.0)
    server, north = _serve(one), one.client("north")
    north.says("round=1 code=ok")
    proxy.stall()
    server.says("client=north silent for too long: its stream ends")
    east = one.client("east")
    proxy.resume()
    _finish(east, server, north)
    assert proxy.connections == 2
    Outcome.of(one).assert_equal(undisturbed)


def test_a_late_client_is_not_waited_for_and_takes_part_again(pair: Pair) -> None:
    one = pair(
        "run.rounds=6",
        "cohort.min_reply_share=0.5",
        deadline_seconds=10,
        heartbeat_seconds=20,
    )
    north, east = (one.client(name) for name in PAIR)
    server = one.server()
    wait_until(lambda: (2, 2) in _replies(one), "a round of both")
    east.send_signal(signal.SIGSTOP)
    wait_until(lambda: _codes(one).get("silent"), "a round without east")
    north.send_signal(signal.SIGSTOP)  # or the run might be over first
    east.send_signal(signal.SIGCONT)
    server.says("client=east late answer dropped")
    north.send_signal(signal.SIGCONT)
    _finish(server, north, east)
    assert _codes(one).keys() == {"silent", "late"}
    assert _replies(one)[-1] == (2, 2)
    assert Outcome.of(one).releases["north"] == [1, 2, 3, 4, 5, 6]


def _replies(one: Federation) -> list[tuple[int, int]]:
    """How many answered in each round, of how many."""
    return [(record["replies"], record["cohort_size"]) for record in one.records()]


def _codes(one: Federation) -> Counter[str]:
    """Why answers did not count, over all rounds."""
    return sum((Counter(record["codes"]) for record in one.records()), Counter())


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], None]]:
    """Puts a file system of 4 MiB at a path."""
    mounted: list[Path] = []

    def mount(path: Path) -> None:
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
        if os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _fill(folder: Path) -> None:
    """Leaves no room at all."""
    with (
        (folder / "filler").open("wb", buffering=0) as file,
        contextlib.suppress(OSError),
    ):
        while True:
            file.write(bytes(4096))


# How much of an answer is on disk when the disk is full.
DISK_FILLS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "outbox": ("fedpeft.privacy.outbox:Outbox.put@2", (1, 1, 1)),
    "ledger": ("fedpeft.privacy.ledger:Ledger.append@1", (1, 0, 0)),
}


@pytest.mark.parametrize("where", DISK_FILLS)
def test_a_client_waits_until_its_disk_has_room(
    where: str,
    pair: Pair,
    small_disk: Callable[[Path], None],
    undisturbed: Outcome,
) -> None:
    place, traces = DISK_FILLS[where]
    one = pair()
    state = one.state("north")
    small_disk(state)
    server, east = _serve(one), one.client("east")
    north = one.client("north", place, action=functools.partial(_fill, state))
    north.says("cannot store the answer")
    assert _traces(one, "north") == traces
    (state / "filler").unlink()
    _finish(north, server, east)
    Outcome.of(one).assert_equal(undisturbed)


def test_a_server_without_room_for_a_checkpoint_says_so_and_goes_on_later(
    pair: Pair, small_disk: Callable[[Path], None], undisturbed: Outcome
) -> None:
    one = pair()
    small_disk(one.run)
    fill = functools.partial(_fill, one.run)
    server = one.server("server.rounds:save_checkpoint@2", action=fill)
    clients = [one.client(name) for name in PAIR]
    last_line = server.ends(2).splitlines()[-1]
    assert last_line.startswith("Error: No space left on device: ")
    assert "round-000002" in last_line
    (one.run / "filler").unlink()
    _finish(one.server(), *clients)
    Outcome.of(one).assert_equal(undisturbed)


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
HOUR = 3600


@pytest.mark.skipif(not FAKETIME.exists(), reason=f"needs {FAKETIME} (libfaketime)")
def test_a_jump_of_the_clock_disturbs_nothing(pair: Pair, undisturbed: Outcome) -> None:
    one = pair()
    clock = one.folder / "clock"
    clock.write_text("+0")
    environment = {  # read the file at every look; leave the monotonic clock alone
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    settings = {name: str(one.folder / f"{name}.toml") for name in ("server", "east")}
    server, east = (
        one.start([command, settings[name]], name, environment=environment)
        for command, name in (("server", "server"), ("client", "east"))
    )
    east.says("round=1 code=ok")
    clock.write_text(f"+{HOUR}")
    time.sleep(3.5)  # more than three heartbeats
    north = one.client("north")
    server.says("client=north joined")
    clock.write_text("+0")
    _finish(server, north, east)
    lines = [json.loads(line) for line in server.output().splitlines() if "{" in line]
    for line in lines:
        assert line["level"] == "INFO"
    times = [datetime.fromisoformat(line["time"]).timestamp() for line in lines]
    assert max(times) - times[0] > HOUR > times[-1] - times[0]
    Outcome.of(one).assert_equal(undisturbed)
