"""What a run keeps opens for its auditor alone, whole and under its own name."""

import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519

from fedpeft import keys
from fedpeft.audit.recording import FOLDER, Answer, Recorder, read_records
from fedpeft.errors import ConfigError, DataError
from fedpeft.keys import seal

RUN = "0123456789abcdef"


@pytest.fixture
def key() -> x25519.X25519PrivateKey:
    return x25519.X25519PrivateKey.generate()


@pytest.fixture
def records(tmp_path: Path, key: x25519.X25519PrivateKey) -> dict[str, Path]:
    """A round of two answers; returns which file is which."""
    recorder, folder = Recorder(tmp_path, RUN, keys.public_of(key)), tmp_path / FOLDER
    found: dict[str, Path] = {}

    def name_the_new_one(name: str) -> None:
        (found[name],) = set(folder.iterdir()) - set(found.values())

    recorder.state(1, b"sent")
    name_the_new_one("state")
    recorder.answer(1, 12, {"code": "ok", "num_examples": -1}, b"came")
    name_the_new_one("client 12")
    recorder.answer(1, 2, {"code": "budget-spent", "num_examples": -1}, b"")
    name_the_new_one("client 2")
    return found


@pytest.fixture
def folder(records: dict[str, Path]) -> Path:
    return records["state"].parent


def test_records_come_back_as_they_were_on_the_wire(
    folder: Path, key: x25519.X25519PrivateKey
) -> None:
    records = read_records(folder.parent, RUN, key)
    assert records.states == {1: b"sent"}
    refused = {"code": "budget-spent", "num_examples": -1}
    answered = {"code": "ok", "num_examples": -1}
    assert records.answers == (
        Answer(1, 2, refused, b""),
        Answer(1, 12, answered, b"came"),
    )


def test_nothing_readable_lies_on_disk(folder: Path) -> None:
    for path in folder.iterdir():
        assert b"came" not in path.read_bytes()
        assert b"budget" not in path.read_bytes()


def test_another_key_is_told_which_one_opens(folder: Path) -> None:
    stranger = x25519.X25519PrivateKey.generate()
    with pytest.raises(DataError, match=r"Expected the key [0-9a-f]{16} to open"):
        read_records(folder.parent, RUN, stranger)


def test_no_name_tells_who_took_part_and_the_folder_is_its_owners(
    folder: Path,
) -> None:
    assert folder.stat().st_mode & 0o077 == 0
    for path in folder.iterdir():
        assert re.fullmatch("[0-9a-f]{32}[.]sealed", path.name)


def test_a_round_that_is_done_again_replaces_its_own(
    folder: Path, key: x25519.X25519PrivateKey
) -> None:
    again = Recorder(folder.parent, RUN, keys.public_of(key))
    again.state(1, b"sent again")
    again.answer(1, 2, {"code": "ok"}, b"came at last")
    records = read_records(folder.parent, RUN, key)
    assert records.states == {1: b"sent again"}
    assert [(a.client, a.payload, a.in_vain) for a in records.answers] == [
        (2, b"came at last", False),
        (12, b"came", True),  # somebody saw it all the same
    ]


@pytest.mark.parametrize("length", [0, 7, 40, 63])
def test_a_truncated_record_is_named(
    records: dict[str, Path], key: x25519.X25519PrivateKey, length: int
) -> None:
    path = records["client 12"]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=rf"{path.name}.*cut short"):
        read_records(path.parent.parent, RUN, key)


def _labelled(label: object) -> bytes:
    text = json.dumps(label).encode()
    return len(text).to_bytes(4, "little") + text + b"came"


@pytest.mark.parametrize(
    "plaintext",
    [
        b"",
        b"\1\0",  # half a length
        b"\1\0\0\0",
        b"\7\0\0\0{}came",  # a label longer than all there is
        b"\2\0\0\0{]came",
        b"\1\0\0\0\xffcame",
        b"\xff\xff\0\0" + 0xFFFF * b"[",
        _labelled([]),
        _labelled({"number": 1, "round": 0, "client": 1, "header": {}}),
        _labelled({"number": 1, "round": 1, "client": -1, "header": {}}),
        _labelled({"number": 1, "round": 1, "client": "1", "header": {}}),
        _labelled({"number": 1, "round": 1, "client": 1, "header": {"a": []}}),
    ],
)
def test_what_opens_and_is_no_record_is_named(
    folder: Path, key: x25519.X25519PrivateKey, plaintext: bytes
) -> None:
    name = f"{32 * '0'}.sealed"
    (folder / name).write_bytes(seal(plaintext, keys.public_of(key), f"{RUN}/{name}"))
    with pytest.raises(DataError, match=rf"{name}.*no recorder wrote"):
        read_records(folder.parent, RUN, key)


def test_a_folder_that_is_named_as_a_record_is_refused(
    folder: Path, key: x25519.X25519PrivateKey
) -> None:
    (folder / "0.sealed").mkdir()
    with pytest.raises(DataError, match=r"Expected a file at .*0[.]sealed"):
        read_records(folder.parent, RUN, key)


def test_one_flipped_bit_is_noticed_wherever_it_is(
    records: dict[str, Path], key: x25519.X25519PrivateKey
) -> None:
    path = records["client 12"]
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        )
        with pytest.raises(DataError):
            read_records(path.parent.parent, RUN, key)


def test_a_record_under_another_name_or_run_does_not_open(
    records: dict[str, Path], key: x25519.X25519PrivateKey
) -> None:
    path = records["client 12"]
    renamed = path.rename(path.with_name("0.sealed"))
    with pytest.raises(DataError, match="renamed"):
        read_records(path.parent.parent, RUN, key)
    renamed.rename(path)
    with pytest.raises(DataError, match="does not open"):
        read_records(path.parent.parent, 16 * "f", key)


def test_a_run_without_records_says_how_to_get_some(
    tmp_path: Path, key: x25519.X25519PrivateKey
) -> None:
    with pytest.raises(DataError, match=r"record = true"):
        read_records(tmp_path, RUN, key)


def test_nobody_owns_the_zero_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedpeft keys auditor"):
        Recorder(tmp_path, RUN, 64 * "0").state(1, b"")


def test_an_auditors_key_is_made_read_and_not_overwritten(tmp_path: Path) -> None:
    path, public = keys.create_auditor(tmp_path, "office")
    assert keys.public_of(keys.read_auditor(path)) == public
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="left it alone"):
        keys.create_auditor(tmp_path, "office")


def test_a_signing_key_is_no_auditors_key(tmp_path: Path) -> None:
    keys.create_signing(tmp_path, "office")
    with pytest.raises(ConfigError, match="another kind"):
        keys.read_auditor(tmp_path / "office.signing.key")
    with pytest.raises(ConfigError, match="Cannot read"):
        keys.read_auditor(tmp_path / "nowhere.auditor.key")
