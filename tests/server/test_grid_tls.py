"""The grid behind mutual TLS: who gets in, and that nobody else disturbs a round."""

import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from client import fleet_pb2 as pb
from client.tls import Peer, peer_of
from fedpeft.errors import ConfigError
from fedpeft.keys import create_ca, create_client, create_server
from server import grid
from tests.transport import Loopback, Runner, data_of, make_keys, request

Keys = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    return folder, make_keys(folder)


@pytest.fixture
def loopback(tmp_path: Path, keys: Keys) -> Iterator[Loopback]:
    loopback = Loopback(tmp_path, keys)
    yield loopback
    loopback.close()


def test_a_certificate_on_the_list_gets_in(loopback) -> None:
    client = loopback.ready("hospital-a")
    loopback.grid.push_messages([request(0)])
    client.answer(client.message())
    client.hear("received")
    assert loopback.grid.connected() == ["hospital-a"]


def test_another_name_than_the_certificates_is_refused(loopback, caplog) -> None:
    client = loopback.by_hand("hospital-a")
    client.say(hello=client.hello(name="hospital-b"))
    assert client.hear("refusal").code == "name-mismatch"
    assert client.is_over()
    (line,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert line.client == "hospital-a"
    assert "got 'hospital-b'" in line.getMessage()
    assert loopback.grid.counts() == {"name-mismatch": 1}


def test_another_certificate_of_the_same_name_is_refused(loopback, tmp_path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(loopback.keys[0], folder)
    create_client(folder, "hospital-a", renew=True)  # the list has the first one
    loopback.keys = folder, loopback.keys[1]
    client = loopback.by_hand("hospital-a")
    client.say(hello=client.hello())
    assert client.hear("refusal").code == "unknown-client"


# --- those whom TLS itself keeps out ------------------------------------------------


def _connects(
    loopback: Loopback, certificate: Path | None = None, key: Path | None = None
) -> bool:
    """Whether gRPC gets through with a certificate, or with none."""
    pair = (key.read_bytes(), certificate.read_bytes()) if certificate and key else ()
    ca = (loopback.keys[0] / "ca.crt").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, *pair)
    with grpc.secure_channel(f"127.0.0.1:{loopback.port}", credentials) as channel:
        call = channel.stream_stream("/fedpeft.v1.Federation/Connect")
        hello = pb.ClientFrame(hello=pb.Hello(name="hospital-a"))
        try:
            next(call(iter([hello.SerializeToString()]), timeout=5))
        except grpc.RpcError:
            return False
        return True


def _no_certificate(loopback: Loopback, folder: Path) -> bool:
    return _connects(loopback)


def _foreign_authority(loopback: Loopback, folder: Path) -> bool:
    create_ca(folder, "test")
    create_client(folder, "hospital-a")
    return _connects(loopback, folder / "hospital-a.crt", folder / "hospital-a.key")


def _expired(loopback: Loopback, folder: Path) -> bool:
    create_client(folder, "hospital-a", ca_folder=loopback.keys[0], days=1e-6)
    time.sleep(1.1)  # certificates count in seconds
    return _connects(loopback, folder / "hospital-a.crt", folder / "hospital-a.key")


def _a_servers_certificate(loopback: Loopback, folder: Path) -> bool:
    pair = loopback.keys[0] / "server.crt", loopback.keys[0] / "server.key"
    return _connects(loopback, *pair)


def _plain_text(loopback: Loopback, folder: Path) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{loopback.port}") as channel:
        call = channel.stream_stream("/fedpeft.v1.Federation/Connect")
        with contextlib.suppress(grpc.RpcError):
            next(call(iter([b""]), timeout=5))
            return True
    return False


def _raw(data: bytes) -> Callable[[Loopback, Path], bool]:
    def connect(loopback: Loopback, folder: Path) -> bool:
        """Whether the connection is still open a while after sending some bytes."""
        with socket.create_connection(("127.0.0.1", loopback.port)) as connection:
            connection.settimeout(5)
            connection.sendall(data)
            try:
                while connection.recv(1000):
                    pass
            except ConnectionError:
                pass
            except TimeoutError:
                return True
            return False

    return connect


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(_no_certificate, id="no certificate"),
        pytest.param(_foreign_authority, id="foreign authority"),
        pytest.param(_expired, id="expired"),
        pytest.param(_a_servers_certificate, id="a server's certificate"),
        pytest.param(_plain_text, id="plain text"),
        pytest.param(_raw(b"GET / HTTP/1.1\r\n\r\n" * 100), id="garbage"),
        pytest.param(_raw(b"\x16\x03\x01"), id="slow loris"),
    ],
)
def test_nobody_else_gets_through_or_disturbs_a_round(
    keys, tmp_path, monkeypatch, attempt
) -> None:
    short = [
        (name, 1000 if name == "grpc.server_handshake_timeout_ms" else value)
        for name, value in grid.OPTIONS
    ]
    monkeypatch.setattr(grid, "OPTIONS", short)
    loopback = Loopback(tmp_path, keys)
    client = loopback.ready("hospital-a")
    (message_id,) = loopback.grid.push_messages([request(0)])
    assert not attempt(loopback, tmp_path / "theirs")
    client.answer(client.message(), b"undisturbed")
    client.hear("received")
    (reply,) = loopback.grid.pull_messages([message_id])
    assert data_of(reply) == b"undisturbed"
    assert loopback.grid.counts() == {}
    loopback.close()


@pytest.mark.parametrize(("version", "expected"), [("tls1_2", False), ("tls1_3", True)])
def test_the_server_speaks_tls_1_3_alone(loopback, version, expected) -> None:
    folder = loopback.keys[0]
    command = ["openssl", "s_client", f"-{version}", "-alpn", "h2", "-brief"]
    files = {"CAfile": "ca.crt", "cert": "hospital-a.crt", "key": "hospital-a.key"}
    options = [part for k, v in files.items() for part in (f"-{k}", str(folder / v))]
    done = subprocess.run(
        [*command, "-connect", f"127.0.0.1:{loopback.port}", *options],
        input=b"",
        capture_output=True,
        timeout=20,
    )
    assert (b"CONNECTION ESTABLISHED" in done.stderr) is expected


@pytest.mark.parametrize(
    ("newest", "certificate", "is_heard"),
    [
        (ssl.TLSVersion.TLSv1_2, "server", False),
        (ssl.TLSVersion.TLSv1_3, "server", True),
        (ssl.TLSVersion.TLSv1_3, "hospital-b", False),
    ],
    ids=["TLS 1.2", "TLS 1.3", "a client's certificate"],
)
def test_a_client_talks_to_a_proper_server_alone(
    loopback, newest, certificate, is_heard
) -> None:
    folder = loopback.keys[0]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(
        folder / f"{certificate}.crt", folder / f"{certificate}.key"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        section = loopback.client_section("hospital-a").model_copy(
            update={"server": f"127.0.0.1:{listener.getsockname()[1]}"}
        )
        runner = Runner(section)
        connection, _ = listener.accept()
        connection.settimeout(10)
        preface = b""
        with (
            contextlib.suppress(OSError),  # among them ssl.SSLError
            context.wrap_socket(connection, server_side=True) as encrypted,
        ):
            preface = encrypted.recv(24)
        runner.stop.set()
        with contextlib.suppress(ConfigError):  # said of a client's certificate
            runner.join()
    assert (preface == b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") is is_heard


def test_renewed_keys_are_used_without_a_stop(tmp_path, caplog) -> None:
    keys = tmp_path / "keys", make_keys(tmp_path / "keys")
    loopback = Loopback(tmp_path, keys)
    first = loopback.ready("hospital-a")
    before = _certificate_of(loopback)
    caplog.set_level(logging.INFO)
    create_server(keys[0], ["127.0.0.1"], renew=True)
    assert _certificate_of(loopback) != before
    assert "keys=renewed" in caplog.text
    (keys[0] / "server.key").chmod(0o644)
    (keys[0] / "server.key").touch()
    after = _certificate_of(loopback)
    assert after == _certificate_of(loopback)  # the renewed one goes on
    assert "keys=unchanged" in caplog.text
    first.say(heartbeat=pb.Heartbeat())
    assert loopback.grid.connected() == ["hospital-a"]
    loopback.close()


def _certificate_of(loopback: Loopback) -> str:
    return ssl.get_server_certificate(("127.0.0.1", loopback.port), timeout=10)


def test_keys_that_cannot_be_used_are_one_line_at_the_start(tmp_path, keys) -> None:
    folder = tmp_path / "keys"
    shutil.copytree(keys[0], folder)
    (folder / "server.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"server\.key"):
        Loopback(tmp_path, (folder, keys[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"x509_common_name": []},
        {"x509_common_name": [b"hospital-a", b"hospital-b"]},
        {"x509_pem_cert": []},
        {"ssl_tls_version": [b"TLSv1.2"]},
    ],
)
def test_a_peer_has_one_name_one_certificate_and_tls_1_3(keys, changes) -> None:
    folder, prints = keys
    context = {
        "x509_common_name": [b"hospital-a"],
        "x509_pem_cert": [(folder / "hospital-a.crt").read_bytes()],
        "ssl_tls_version": [b"TLSv1.3"],
    }
    assert peer_of(context) == Peer("hospital-a", prints["hospital-a"])
    assert peer_of({**context, **changes}) is None
