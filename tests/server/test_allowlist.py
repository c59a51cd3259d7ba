"""Who is admitted, while the file is edited under a running server."""

import logging
import os
from pathlib import Path

import pytest

from fedpeft.errors import ConfigError
from server.allowlist import AllowList

A, B, C = (f"sha256:{digit * 64}" for digit in "abc")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "clients.toml"
    _write(path, f'zoo = ["{A}"]', f'hospital-a = ["{B}", "{C}"]', "rehearsal = []")
    return path


def _write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(("[clients]", *lines)))


def test_names_come_in_the_order_of_the_file(path: Path) -> None:
    assert AllowList(path).names() == ["zoo", "hospital-a", "rehearsal"]


def test_a_client_is_admitted_by_its_own_fingerprints_alone(path: Path) -> None:
    allow = AllowList(path)
    assert allow.admits("zoo", A)
    assert allow.admits("hospital-a", B)
    assert allow.admits("hospital-a", C)
    assert not allow.admits("zoo", B)
    assert not allow.admits("nobody", A)
    assert not allow.admits("rehearsal", A)


def test_without_certificates_the_name_is_enough(path: Path) -> None:
    allow = AllowList(path)
    assert allow.admits("rehearsal", None)
    assert not allow.admits("nobody", None)


def test_a_change_holds_from_the_next_question_on(path: Path) -> None:
    allow = AllowList(path)
    _write(path, f'zoo = ["{A}"]', f'new = ["{C}"]')
    assert allow.admits("new", C)
    assert not allow.admits("hospital-a", B)
    assert allow.names() == ["zoo", "new"]


def test_a_change_is_seen_though_size_and_time_stay(path: Path) -> None:
    allow = AllowList(path)
    before = path.stat()
    path.write_text(path.read_text().replace(A, f"sha256:{'d' * 64}"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not allow.admits("zoo", A)


@pytest.mark.parametrize("broken", ["", "[clients", "x = 1", '[clients]\nzoo = ["a"]'])
def test_a_broken_file_keeps_the_last_good_list_and_warns_once(
    path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = path.read_text()
    allow = AllowList(path)
    path.write_text(broken)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert allow.admits("zoo", A)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()
    assert len(record.getMessage().splitlines()) == 1
    path.write_text(good.replace("zoo", "ark"))
    assert allow.admits("ark", A)
    assert not allow.admits("zoo", A)


def test_a_file_that_is_gone_keeps_the_last_good_list(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allow = AllowList(path)
    good = path.read_bytes()
    path.unlink()
    assert allow.names() == ["zoo", "hospital-a", "rehearsal"]
    assert allow.admits("zoo", A)
    assert len(caplog.records) == 1
    path.write_bytes(good)
    assert allow.admits("zoo", A)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[clients", "is no TOML"),
        (b"\xff", "is no TOML"),
        (b"", "Expected one section, .clients., .* got none"),
        (b"[client]\n[clients]", "got client, clients"),
        (b"clients = 3", "Expected one section"),
        (b"[clients]\nA = []", "Expected names of a-z, 0-9 and -.* got 'A'"),
        (b'[clients]\n"a\\n" = []', "Expected names of a-z"),
        (b'[clients]\na = "sha256:0"', "Expected a = "),
        (b'[clients]\na = ["sha256:0"]', "64 hexadecimal digits"),
        (b"[clients]\na = [3]", "64 hexadecimal digits"),
        (
            f'[clients]\na = ["{A}"]\nb = ["{A}"]'.encode(),
            f"each fingerprint at one name .* {A} at a and b",
        ),
    ],
)
def test_a_file_broken_from_the_start_is_refused(
    path: Path, content: bytes, message: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        AllowList(path)
    assert str(path) in str(error.value)


def test_a_file_that_never_was_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="`fedpeft keys client NAME` prints its lines"
    ):
        AllowList(tmp_path / "clients.toml")
