"""What the adversaries of a run saw, byte by byte, kept for its auditor alone.

``RUN/observations`` holds for every round the state that was sent and each client's
answer, as they were on the wire, a file each. The server, which writes them, cannot
open them; their names are random, and of which round and client a file is stands
inside.

**Not guaranteed**: who wrote a record. Whoever can write to the folder and knows the
auditor's public key may replace a record wholly, and the new one opens as well.
"""

import itertools
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import x25519
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from fedpeft.durable import make_directory, write_atomically
from fedpeft.errors import DataError
from fedpeft.keys import seal, unseal

FOLDER = "observations"

_FILES = "*.sealed"
_LENGTH = struct.Struct("<I")

Header = Mapping[str, str | int]


class _Label(BaseModel, strict=True):
    """What a record is of; a state is of no client."""

    number: NonNegativeInt
    round: PositiveInt
    client: NonNegativeInt | None
    header: dict[str, str | int]


@dataclass(frozen=True)
class Recorder:
    """Writes records of one run.

    **Guarantees**: a record that is there is whole, and on disk when the method
    returns. A round that is done again replaces its own when it is read. The folder is
    its owner's alone.

    Attributes:
        output: the run directory.
        run: the run's id; records open as this run's alone.
        auditor: the public key that they are sealed for.
    """

    output: Path
    run: str
    auditor: str

    def state(self, server_round: int, payload: bytes) -> None:
        """Keeps what all clients of a round were sent."""
        self._write(server_round, None, {}, payload)

    def answer(
        self, server_round: int, client: int, header: Header, payload: bytes
    ) -> None:
        """Keeps one client's answer.

        Args:
            server_round: from 1.
            client: index of the client.
            header: every other field of the answer, as it came.
            payload: the compressed update; may be empty.
        """
        self._write(server_round, client, header, payload)

    def _write(
        self, server_round: int, client: int | None, header: Header, payload: bytes
    ) -> None:
        label = _Label(
            number=next(self._numbers),
            round=server_round,
            client=client,
            header=dict(header),
        )
        text = label.model_dump_json().encode()
        data = _LENGTH.pack(len(text)) + text + payload
        name = f"{secrets.token_hex(16)}.sealed"
        sealed = seal(data, self.auditor, f"{self.run}/{name}")
        write_atomically(self.output / FOLDER / name, sealed)

    @cached_property
    def _numbers(self) -> Iterator[int]:
        """Numbers larger than those of all records that are there."""
        folder = self.output / FOLDER
        make_directory(folder)
        folder.chmod(0o700)  # how many there are would tell how many answered
        return itertools.count(sum(1 for _ in folder.glob(_FILES)))


@dataclass(frozen=True)
class Answer:
    """One client's answer in one round, as it was on the wire.

    Attributes:
        in_vain: whether the round was done again, and then without this client.
    """

    server_round: int
    client: int
    header: Header
    payload: bytes
    in_vain: bool = False


@dataclass(frozen=True)
class Records:
    """All that a run kept.

    Attributes:
        states: round -> what was sent, a dense payload.
        answers: by round, then by client.
    """

    states: dict[int, bytes]
    answers: tuple[Answer, ...]


def read_records(output: Path, run: str, key: x25519.X25519PrivateKey) -> Records:
    """Opens everything that a run kept; of one answer's records the last one counts.

    Raises:
        DataError: if it kept nothing, or a record does not open or is none inside.
    """
    folder = output / FOLDER
    paths = sorted(folder.glob(_FILES)) if folder.is_dir() else []
    if not paths:
        raise DataError(
            f"Expected observations in {folder}, found none: the run was not recorded. "
            "Run it with [audit] record = true, or audit its scenario instead."
        )
    newest: dict[tuple[int, int | None], tuple[_Label, bytes]] = {}
    for path in paths:
        label, payload = _read(path, run, key)
        place = label.round, label.client
        if place not in newest or label.number > newest[place][0].number:
            newest[place] = label, payload
    states, answers = {}, []
    for (server_round, client), (label, payload) in newest.items():
        begun = newest.get((server_round, None))
        if client is None:
            states[server_round] = payload
        else:
            in_vain = begun is not None and begun[0].number > label.number
            answers.append(Answer(server_round, client, label.header, payload, in_vain))
    answers.sort(key=lambda answer: (answer.server_round, answer.client))
    return Records(states, tuple(answers))


def _read(path: Path, run: str, key: x25519.X25519PrivateKey) -> tuple[_Label, bytes]:
    try:
        if not path.is_file():
            raise DataError(f"Expected a file at {path}, got none: move it away.")
        sealed = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the record {path}: {error.strerror}.") from None
    return _parse(unseal(sealed, key, f"{run}/{path.name}"), path)


def _parse(data: bytes, path: Path) -> tuple[_Label, bytes]:
    """Takes a record apart; that it opened says nothing of who made it."""
    start = _LENGTH.size
    end = start + int.from_bytes(data[:start], "little")
    if len(data) < max(start, end):
        raise DataError(
            f"Expected a label of {end - start} bytes in {path}, got "
            f"{max(0, len(data) - start)} bytes in all: no recorder wrote this."
        )
    try:
        return _Label.model_validate_json(data[start:end]), data[end:]
    except ValidationError:
        raise DataError(
            f"Expected round, client and header of an answer in {path}, got something "
            "else: no recorder wrote this."
        ) from None
