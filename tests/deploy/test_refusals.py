"""Who must not get in tries to, one after the other, while a round is under way.

One federation of real processes: north has answered in round 1, which waits for east;
west has no part in it, so that intruders may come in its name. Each test says which
lines it adds to the server's log. In the end east comes, all three answer five rounds
more, and but for those lines nothing shows that anybody was there.
"""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file

from client import fleet_pb2 as pb
from client.agreement import Proposal
from client.wire import CONNECT, cut
from fedpeft import keys
from fedpeft.privacy import data_sources
from fedpeft.tensors import flatten
from server.allowlist import AllowList
from server.fleet import UNASKED_ANSWERS as MANY
from server.grid import GrpcGrid
from server.settings import ServerSection
from server.slots import Slots
from simulations.engine import simulate
from tests.deploy.federation import NAMES, Federation, Outcome, wait_until
from tests.deploy.scene import OPTIONS, ROUNDS, Scene, assert_begin
from tests.transport import HandMade

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 10.0
"""Of a handshake, and for the first word after it."""


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, small_reviews: Path
) -> Iterator[Scene]:
    scene = Scene(tmp_path_factory.mktemp("scene"), small_reviews)
    yield scene
    scene.close()


# --- whom TLS keeps out, before there is anybody to name in the log -----------------

Attempt = Callable[[Scene, Path], bool]


def _dial(scene: Scene, certificate: Path | None = None) -> bool:
    """Whether gRPC gets through with a certificate and its key, or with none."""
    ca, pair = (scene.keys / "ca.crt").read_bytes(), ()
    if certificate:
        pair = certificate.with_suffix(".key").read_bytes(), certificate.read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, *pair)
    with grpc.secure_channel(f"127.0.0.1:{scene.port}", credentials) as channel:
        return _hello(channel)


def _hello(channel: grpc.Channel) -> bool:
    hello = pb.ClientFrame(hello=pb.Hello(name="west")).SerializeToString()
    try:
        next(channel.stream_stream(CONNECT)(iter([hello]), timeout=5))
    except grpc.RpcError as error:
        return error.code() != grpc.StatusCode.UNAVAILABLE
    return True


def _no_certificate(scene: Scene, folder: Path) -> bool:
    return _dial(scene)


def _foreign_authority(scene: Scene, folder: Path) -> bool:
    keys.create_ca(folder, "test")
    return _dial(scene, keys.create_client(folder, "west").path)


def _expired(scene: Scene, folder: Path) -> bool:
    late = keys.create_client(folder, "west", ca_folder=scene.keys, days=1e-6)
    time.sleep(1.1)  # certificates count in seconds
    return _dial(scene, late.path)


def _signed_by_itself(scene: Scene, folder: Path) -> bool:
    folder.mkdir()
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    files = ["-keyout", str(folder / "west.key"), "-out", str(folder / "west.crt")]
    command = ["openssl", "req", "-x509", "-subj", "/CN=west", *new, *files]
    subprocess.run(command, check=True, capture_output=True)
    return _dial(scene, folder / "west.crt")


def _a_servers(scene: Scene, folder: Path) -> bool:
    return _dial(scene, scene.keys / "server.crt")


def _plain_grpc(scene: Scene, folder: Path) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{scene.port}") as channel:
        return _hello(channel)


def _raw(data: bytes) -> Attempt:
    def attempt(scene: Scene, folder: Path) -> bool:
        with socket.create_connection(("127.0.0.1", scene.port)) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            return not _is_ended(connection, 5)

    return attempt


def _is_ended(connection: socket.socket, seconds: float) -> bool:
    """Reads whatever comes; whether the other side ends the connection in time."""
    deadline = time.monotonic() + seconds
    try:
        while True:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            if not connection.recv(1 << 16):
                return True
    except TimeoutError:
        return False
    except OSError:
        return True


ATTEMPTS: dict[str, Attempt] = {
    "no certificate": _no_certificate,
    "a foreign authority": _foreign_authority,
    "an expired certificate": _expired,
    "a self-signed certificate": _signed_by_itself,
    "a server's certificate": _a_servers,
    "gRPC in plain text": _plain_grpc,
    "HTTP/1.1": _raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "random bytes": _raw(os.urandom(1 << 20)),
    "a broken handshake": _raw(b"\x16\x03\x01\x00\x05hello" * 9),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_who_has_no_proper_certificate_does_not_get_through(
    scene: Scene, tmp_path: Path, attempt: str
) -> None:
    with scene.logs():
        assert not ATTEMPTS[attempt](scene, tmp_path / "theirs")


def _certificate(scene: Scene) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=scene.keys / "ca.crt")
    context.load_cert_chain(scene.keys / "west.crt", scene.keys / "west.key")
    context.set_alpn_protocols(["h2"])
    return context


def test_who_dawdles_is_sent_away(scene: Scene) -> None:
    before = time.monotonic()
    silent = "WARNING client=ipv4:127.0.0.1:"
    with contextlib.ExitStack() as stack, scene.logs(*3 * [silent]):
        streams = [scene.by_hand("west") for _ in range(3)]  # who never say Hello
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", scene.port)))
            for _ in range(60)
        ]
        wrap = _certificate(scene).wrap_socket
        for number in range(20):  # who never speak HTTP/2
            wrapped = wrap(connections[number], server_hostname="127.0.0.1")
            connections[number] = stack.enter_context(wrapped)
        for byte in b"\x16\x03\x01\x02\x00\x01":  # who begin a handshake, slowly
            for connection in connections[20:40]:
                connection.sendall(bytes([byte]))
            time.sleep(0.5)
        for connection in connections:
            patience = before + TIMEOUT_SECONDS + 5 - time.monotonic()
            assert _is_ended(connection, patience)
        assert all(stream.is_over() for stream in streams)
    assert time.monotonic() - before > TIMEOUT_SECONDS - 1  # none was sent away at once
    for stream in streams:
        stream.close()


@pytest.mark.parametrize(("version", "expected"), [("tls1_2", False), ("tls1_3", True)])
def test_the_server_speaks_tls_1_3_alone(
    scene: Scene, version: str, expected: bool
) -> None:
    files = {"CAfile": "ca.crt", "cert": "west.crt", "key": "west.key"}
    options = [part for k, v in files.items() for part in (f"-{k}", scene.keys / v)]
    command = ["openssl", "s_client", f"-{version}", "-alpn", "h2", "-brief", *options]
    with scene.logs():
        done = subprocess.run(
            [*command, "-connect", f"127.0.0.1:{scene.port}"],
            input=b"",
            capture_output=True,
            timeout=20,
        )
    assert (b"Protocol version: TLSv1.3" in done.stderr) is expected


# --- whom the server refuses, each in one line --------------------------------------

Misdeed = Callable[[Scene], HandMade]


def _stranger(scene: Scene) -> HandMade:
    client = scene.by_hand("stranger")
    client.say(hello=client.hello())
    return client


def _hello_with(**changes: object) -> Misdeed:
    def act(scene: Scene) -> HandMade:
        client = scene.by_hand("west")
        client.say(hello=client.hello(**changes))
        return client

    return act


def _other_plan(scene: Scene) -> HandMade:
    client = scene.welcome()
    client.say(ready=pb.Ready(accepted="f" * 32))
    return client


def _once_ready(*frames: bytes) -> Misdeed:
    def act(scene: Scene) -> HandMade:
        client = scene.ready()
        client.send(*frames)
        return client

    return act


def _begin(size: int) -> bytes:
    return pb.ClientFrame(begin=pb.Begin(message_id="1", size=size)).SerializeToString()


MISDEEDS: dict[str, tuple[str, Misdeed]] = {
    "a name not on the list": ("unknown-client", _stranger),
    "another client's name": ("name-mismatch", _hello_with(name="north")),
    "the next protocol": (
        "protocol-version",
        _hello_with(protocol=pb.Protocol(major=2)),
    ),
    "a minor version two ahead": (
        "protocol-version",
        _hello_with(protocol=pb.Protocol(major=1, minor=2)),
    ),
    "another plan": ("plan-not-accepted", _other_plan),
    "a GiB": ("too-large", _once_ready(_begin(1 << 30))),
    "2^63 bytes": ("too-large", _once_ready(_begin(1 << 63))),
    "garbage": ("invalid-frame", _once_ready(b"\xff\x00 garbage")),
    "an empty frame": ("invalid-frame", _once_ready(b"")),
    "two messages at once": ("invalid-frame", _once_ready(_begin(9), _begin(9))),
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_misdeed_is_refused_in_one_line(scene: Scene, misdeed: str) -> None:
    code, act = MISDEEDS[misdeed]
    name = "stranger" if act is _stranger else "west"
    lines = [f"WARNING client={name} code={code} refused: Expected"]
    if code in ("too-large", "invalid-frame"):
        lines = ["INFO client=west joined", *lines, "INFO client=west left"]
    memory = scene.memory()
    with scene.logs(*lines):
        client = act(scene)
        assert client.hear("refusal").code == code
        assert client.is_over()
    assert scene.memory() - memory < 8 << 20
    client.close()


def test_a_minor_version_one_ahead_is_welcome(scene: Scene) -> None:
    with scene.logs("INFO client=west joined", "INFO client=west left"):
        client = _hello_with(protocol=pb.Protocol(major=1, minor=1))(scene)
        client.hear("welcome")
        client.say(ready=pb.Ready(accepted=scene.federation.hash))
        wait_until(lambda: "west joined" in scene.lines()[-1], "west")
        client.close()


def test_nobody_answers_in_anothers_place(scene: Scene) -> None:
    with scene.logs("INFO client=east joined", "INFO client=east left"):
        east = scene.ready("east")
        asked = east.message().metadata.message_id
        east.close()
    refused = f"code=invalid-frame refused: Expected answers to requests, got {MANY} to"
    with scene.logs(
        "INFO client=west joined",
        f"WARNING client=west {refused}",
        "INFO client=west left",
    ):
        west = scene.ready("west")
        for _ in range(MANY):
            west.send(*cut(pb.ClientFrame, asked, b"not mine to give"))
        heard = [west.hear("received").message_id for _ in range(MANY - 1)]
        assert west.hear("refusal").code == "invalid-frame"
    assert set(heard) == {asked}
    west.close()


# --- what a client refuses ----------------------------------------------------------


def _west(scene: Scene, expected: str, limits: str = "", **changes: object) -> None:
    """Starts west with other settings; it ends with one line and has spent nothing."""
    federation, state = scene.federation, scene.folder / "refusing"
    settings = {"state": str(state), **changes}
    federation.write_client("west", "share = 2", limits, **settings)
    output = federation.client("west").ends(2)
    federation.write_client("west", "share = 2")
    assert expected in " ".join(output.split())
    assert not data_sources(state)


def test_a_client_talks_to_no_server_of_a_foreign_authority(
    scene: Scene, tmp_path: Path
) -> None:
    keys.create_ca(tmp_path, "test")
    own = keys.create_client(tmp_path, "west").path
    files = {"certificate": own, "key": own.with_suffix(".key")}
    with scene.logs():
        _west(
            scene,
            "Expected a server's certificate of the authority in [client] ca",
            ca=str(tmp_path / "ca.crt"),
            **{name: str(path) for name, path in files.items()},
        )


@contextlib.contextmanager
def _false_server(
    scene: Scene, certificate: str, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> Iterator[tuple[str, list[str | None]]]:
    """Yields the address of a server by hand, and TLS versions as clients come in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.set_alpn_protocols(["h2"])
    pair = (scene.keys / f"{certificate}{ending}" for ending in (".crt", ".key"))
    context.load_cert_chain(*pair)
    versions: list[str | None] = []

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    wrapped = context.wrap_socket(connection, server_side=True)
                    versions.append(wrapped.version())
                    wrapped.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", versions
        listener.shutdown(socket.SHUT_RDWR)


def test_a_client_takes_no_other_client_for_the_server(scene: Scene) -> None:
    with scene.logs(), _false_server(scene, "stranger") as (address, versions):
        _west(scene, "Expected a server's certificate of the authority", server=address)
    assert versions == []


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_speaks_tls_1_3_alone(scene: Scene, newest: ssl.TLSVersion) -> None:
    federation = scene.federation
    with scene.logs(), _false_server(scene, "server", newest) as (address, versions):
        federation.write_client("west", "share = 2", server=address, state="refusing")
        client = federation.client("west")
        client.says("connection lost: UNAVAILABLE")
        client.kill()
    assert set(versions) == ({"TLSv1.3"} if newest.name == "TLSv1_3" else set())


@pytest.mark.parametrize(
    ("limit", "named"),
    [
        ("max_epsilon = 7.5", "max_epsilon: expected epsilon of at most 7.5 a run"),
        ("max_delta = 1e-6", "max_delta: expected delta of at most 1e-06"),
        ("budget_epsilon = 7.5", "budget_epsilon: expected a run within 7.5"),
        ('units = ["person"]', "units: expected a plan of unit person, got 'example'"),
    ],
)
def test_a_client_takes_no_plan_beyond_its_limits_though_accepted(
    scene: Scene, limit: str, named: str
) -> None:
    with scene.logs():
        _west(scene, f"beyond [limits] {named}", limit)


def test_a_client_takes_no_plan_that_was_not_accepted(scene: Scene) -> None:
    with scene.logs():
        _west(scene, f"Expected the plan {'f' * 64}", accept="f" * 64)


def test_a_client_takes_no_certificate_of_a_server_for_its_own(scene: Scene) -> None:
    files = {"certificate": "server.crt", "key": "server.key"}
    with scene.logs():
        _west(
            scene,
            "Expected a client's certificate in",
            **{name: str(scene.keys / file) for name, file in files.items()},
        )


def test_a_client_takes_no_other_backbone(scene: Scene, tmp_path: Path) -> None:
    toml = scene.federation.config.to_toml()
    other = Proposal("0" * 16, toml, "f" * 64)
    section = ServerSection(
        scenario="none",
        output=tmp_path,
        address="127.0.0.1:0",
        allow=scene.folder / "clients.toml",
        certificate=scene.keys / "server.crt",
        key=scene.keys / "server.key",
        ca=scene.keys / "ca.crt",
    )
    allow = AllowList(section.allow)
    slots = Slots(tmp_path / "slots.json", allow, len(NAMES))
    grid = GrpcGrid(section, other, allow, slots, 1 << 20)
    address = f"127.0.0.1:{grid.start()}"
    _west(
        scene,
        "Expected the server's backbone minilm (ffffffffffffffff), this site's is",
        accept=other.hash,
        server=address,
    )
    grid.close(finished=False)


def test_a_server_takes_no_certificate_of_a_client_for_its_own(
    scene: Scene, tmp_path: Path, small_reviews: Path
) -> None:
    other = Federation(tmp_path, small_reviews, scene.keys, *OPTIONS)
    names = {"certificate": "north.crt", "key": "north.key"}
    other.write_server(**{key: str(scene.keys / name) for key, name in names.items()})
    server = other.server()
    assert "Expected a server's certificate in" in " ".join(server.ends(2).split())


# --- members whose standing changes -------------------------------------------------


def test_who_is_revoked_is_out_at_the_next_heartbeat_and_stays_out(
    scene: Scene,
) -> None:
    refused = "WARNING client=north code=unknown-client refused: Expected a client on"
    with scene.logs(
        "INFO allow_list=changed clients=2", refused, "INFO client=north left"
    ):
        scene.allow("east", "west")
        assert "refused this client (unknown-client)" in scene.north.ends(2)
    with scene.logs(refused):
        again = scene.federation.client("north")
        assert "refused this client (unknown-client)" in again.ends(2)
    with scene.logs("INFO allow_list=changed clients=3", "INFO client=north joined"):
        scene.allow(*NAMES)
        scene.north = scene.federation.client("north")


def test_of_two_processes_with_one_certificate_the_newer_one_stays(
    scene: Scene,
) -> None:
    federation = scene.federation
    joined, left = "INFO client=west joined", "INFO client=west left"
    with scene.logs(joined):
        federation.write_client("west", "share = 2", state="elsewhere")
        older = federation.client("west")
    with scene.logs(joined, "WARNING client=west code=superseded refused", left):
        federation.write_client("west", "share = 2")
        scene.west = federation.client("west")
        assert "(superseded): This client has connected anew" in older.ends(2)
    assert data_sources(scene.folder / "elsewhere") == []


def test_renewed_certificates_are_used_without_a_stop(scene: Scene) -> None:
    address = ("127.0.0.1", scene.port)
    before = ssl.get_server_certificate(address)
    (old,) = scene.federation.fingerprint("north")
    with scene.logs("INFO keys=renewed"):
        keys.create_server(scene.keys, ["127.0.0.1"], renew=True)
        assert ssl.get_server_certificate(address) != before
    with scene.logs("INFO allow_list=changed clients=3"):
        new = keys.create_client(scene.keys, "north", renew=True).fingerprint
        prints = {name: scene.federation.fingerprint(name) for name in NAMES}
        scene.federation.allow({**prints, "north": [old, new]})
    with scene.logs("INFO client=north left", "INFO client=north joined"):
        scene.proxy.cut()
    with scene.logs("INFO allow_list=changed clients=3"):
        scene.federation.allow(prints)  # without the old one, and nobody has to leave
    assert scene.north.output().count("connected server=") == 2


# --- the end ------------------------------------------------------------------------


def test_the_run_ends_as_if_nobody_had_been_there(scene: Scene, tmp_path: Path) -> None:
    federation = scene.federation
    assert_begin(scene.lines(), scene.expected)
    if scene.west is None:
        with scene.logs("INFO client=west joined"):
            scene.west = federation.client("west")
    over = threading.Event()
    intruders = threading.Thread(target=_intrude, args=(scene, tmp_path, over))
    intruders.start()
    east = federation.client("east")
    scene.server.ends()
    over.set()
    intruders.join()
    for client in (scene.north, east, scene.west):
        client.ends()
    rest = scene.lines()[len(scene.expected) :]
    rounds = [f"INFO round={n} replies=2/2" for n in range(1, ROUNDS + 1)]
    assert_begin(rest[: ROUNDS + 1], ["INFO client=east joined", *rounds])
    assert sorted(rest[ROUNDS + 1 :]) == [
        f"INFO client={name} left" for name in sorted(NAMES)
    ]
    result = json.loads((federation.run / "result.json").read_text())
    assert all(r["failures"] == 0 and r["codes"] == {} for r in result["rounds"])
    simulated = simulate(federation.config, tmp_path / "simulated")
    model = load_file(tmp_path / "simulated" / "model" / "adapter.safetensors")
    outcome = Outcome.of(federation)
    assert torch.equal(outcome.model, flatten(model))
    assert result["final"] == simulated["final"]
    assert max(outcome.spent.values()) == simulated["privacy"]["spent_epsilon"]


def _intrude(scene: Scene, folder: Path, over: threading.Event) -> None:
    """Lets intruders try again and again while the rounds go on."""
    keys.create_ca(folder / "theirs", "test")
    own = keys.create_client(folder / "theirs", "west").path
    while not over.wait(0.1):
        _dial(scene)
        _dial(scene, own)
        with contextlib.suppress(ConnectionError):  # once the server has ended
            ATTEMPTS["random bytes"](scene, folder)
