"""Signed reports: every byte of both files counts."""

import re
from pathlib import Path

import pytest

from fedpeft.audit.gates import judge_policy
from fedpeft.audit.policy import default_policy
from fedpeft.audit.report import write_report
from fedpeft.audit.signing import sign_report, verify_report
from fedpeft.errors import ConfigError, FedpeftError
from fedpeft.keys import create_signing
from tests.audit.examples import audit, bare_audit


def pair(folder: Path, name: str = "auditor") -> tuple[bytes, bytes]:
    """Returns a new private and public key."""
    path = create_signing(folder, name)
    return path.with_suffix(".key").read_bytes(), path.read_bytes()


@pytest.fixture
def keys(tmp_path: Path) -> tuple[bytes, bytes]:
    return pair(tmp_path)


@pytest.fixture
def report(tmp_path: Path, keys: tuple[bytes, bytes]) -> Path:
    found = bare_audit()
    folder = tmp_path / "audit"
    write_report(found, judge_policy(default_policy(), found), folder, keys[0])
    return folder


def test_a_signed_report_verifies_by_any_of_its_files(report, keys) -> None:
    for name in ("report.html", "report.json", "report.sig", "."):
        assert verify_report(report / name, keys[1]) == report


@pytest.mark.parametrize("name", ["report.html", "report.json"])
@pytest.mark.parametrize("place", [0, 1000, -1])
def test_one_flipped_bit_fails_and_the_file_is_named(report, keys, name, place) -> None:
    data = bytearray((report / name).read_bytes())
    data[place] ^= 1
    (report / name).write_bytes(data)
    with pytest.raises(
        FedpeftError, match=f"^Not verified: {re.escape(name)} in "
    ) as caught:
        verify_report(report / "report.json", keys[1])
    assert len(str(caught.value).splitlines()) == 1


def test_no_flipped_byte_of_the_signature_verifies(report, keys) -> None:
    whole = (report / "report.sig").read_bytes()
    for place in range(len(whole)):
        for bit in (1, 4, 32):
            data = bytearray(whole)
            data[place] ^= bit
            (report / "report.sig").write_bytes(data)
            with pytest.raises(FedpeftError, match=r"^Not verified: "):
                verify_report(report, keys[1])


def test_a_byte_more_or_less_fails(report, keys) -> None:
    whole = (report / "report.sig").read_bytes()
    for changed in (whole[:-1], whole + b"\n", b"", whole[:80]):
        (report / "report.sig").write_bytes(changed)
        with pytest.raises(FedpeftError, match="is no whole signature"):
            verify_report(report, keys[1])


def test_another_key_does_not_verify(report, tmp_path) -> None:
    _, other = pair(tmp_path, "other")
    with pytest.raises(FedpeftError, match="was not made with this key"):
        verify_report(report, other)


def test_a_private_key_is_no_public_one(report, keys) -> None:
    with pytest.raises(ConfigError, match=r"take NAME\.signing\.pub"):
        verify_report(report, keys[0])
    with pytest.raises(ConfigError, match="in the signing key, got none"):
        sign_report(report, b"no key at all")


def test_a_missing_file_and_a_strange_one_are_named(report, keys) -> None:
    with pytest.raises(ConfigError, match=r"Expected report\.html, report\.json"):
        verify_report(report / "policy.toml", keys[1])
    (report / "report.html").unlink()
    with pytest.raises(ConfigError, match=r"Cannot read .*report\.html"):
        verify_report(report, keys[1])


def test_an_unsigned_report_leaves_no_older_signature_behind(report, keys) -> None:
    found = audit()
    write_report(found, judge_policy(default_policy(), found), report)
    assert not (report / "report.sig").exists()
    with pytest.raises(ConfigError, match=r"Cannot read .*report\.sig"):
        verify_report(report, keys[1])


def test_the_hashes_can_be_read_by_sha256sum(report) -> None:
    lines = (report / "report.sig").read_text().splitlines()
    assert lines[0] == "fedpeft-report/1"
    assert [line.split("  ")[1] for line in lines[1:3]] == [
        "report.html",
        "report.json",
    ]
