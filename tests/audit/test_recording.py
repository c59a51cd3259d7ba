"""What a run keeps opens for its auditor alone, whole and under its own name."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519

from fedpeft import keys
from fedpeft.audit.recording import Answer, Recorder, read_records
from fedpeft.errors import ConfigError, DataError
from fedpeft.keys import seal

RUN = "0123456789abcdef"


@pytest.fixture
def key() -> x25519.X25519PrivateKey:
    return x25519.X25519PrivateKey.generate()


@pytest.fixture
def folder(tmp_path: Path, key: x25519.X25519PrivateKey) -> Path:
    recorder = Recorder(tmp_path, RUN, keys.public_of(key))
    recorder.state(1, b"sent")
    recorder.answer(1, 12, {"code": "ok", "num_examples": -1}, b"came")
    recorder.answer(1, 2, {"code": "budget-spent", "num_examples": -1}, b"")
    return tmp_path / "observations"


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


@pytest.mark.parametrize("length", [0, 7, 40, 63])
def test_a_truncated_record_is_named(
    folder: Path, key: x25519.X25519PrivateKey, length: int
) -> None:
    path = folder / "0001-client-12.sealed"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"0001-client-12.sealed.*cut short"):
        read_records(folder.parent, RUN, key)


@pytest.mark.parametrize(
    "plaintext",
    [
        b"",
        b"\1\0",  # half a length
        b"\1\0\0\0",
        b"\7\0\0\0{}came",  # a header longer than all there is
        b"\2\0\0\0{]came",
        b"\1\0\0\0\xffcame",
        b"\2\0\0\0[]came",
        b'\x08\0\0\0{"a":[]}came',
        b"\xff\xff\0\0" + 0xFFFF * b"[",
    ],
)
def test_what_opens_and_is_no_record_is_named(
    folder: Path, key: x25519.X25519PrivateKey, plaintext: bytes
) -> None:
    name = "0001-client-12.sealed"
    (folder / name).write_bytes(seal(plaintext, keys.public_of(key), f"{RUN}/{name}"))
    with pytest.raises(DataError, match=r"0001-client-12[.]sealed.*no recorder wrote"):
        read_records(folder.parent, RUN, key)


@pytest.mark.parametrize(
    "name",
    [
        "00001-client-12.sealed",
        "1-client-12.sealed",
        "0001-client-012.sealed",
        "00001-state.sealed",
        "0001-client-1\N{ARABIC-INDIC DIGIT TWO}.sealed",
    ],
)
def test_a_second_spelling_of_a_name_is_refused(
    folder: Path, key: x25519.X25519PrivateKey, name: str
) -> None:
    sealed = seal(b"\2\0\0\0{}twice", keys.public_of(key), f"{RUN}/{name}")
    (folder / name).write_bytes(sealed)
    with pytest.raises(DataError, match=f"got {name}: a record has one name"):
        read_records(folder.parent, RUN, key)


def test_a_folder_that_is_named_as_a_record_is_refused(
    folder: Path, key: x25519.X25519PrivateKey
) -> None:
    (folder / "0001-client-3.sealed").mkdir()
    with pytest.raises(DataError, match=r"Expected a file at .*0001-client-3[.]sealed"):
        read_records(folder.parent, RUN, key)


def test_one_flipped_bit_is_noticed_wherever_it_is(
    folder: Path, key: x25519.X25519PrivateKey
) -> None:
    path = folder / "0001-client-12.sealed"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        )
        with pytest.raises(DataError):
            read_records(folder.parent, RUN, key)


def test_a_record_under_another_name_or_run_does_not_open(
    folder: Path, key: x25519.X25519PrivateKey
) -> None:
    (folder / "0001-client-12.sealed").rename(folder / "0001-client-13.sealed")
    with pytest.raises(DataError, match="renamed"):
        read_records(folder.parent, RUN, key)
    (folder / "0001-client-13.sealed").unlink()
    with pytest.raises(DataError, match=r"0001-client-2[.]sealed"):
        read_records(folder.parent, 16 * "f", key)


def test_answers_without_the_state_of_their_round_are_refused(
    folder: Path, key: x25519.X25519PrivateKey
) -> None:
    (folder / "0001-state.sealed").unlink()
    with pytest.raises(DataError, match="incomplete"):
        read_records(folder.parent, RUN, key)


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
