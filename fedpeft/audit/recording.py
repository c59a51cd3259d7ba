"""What the adversaries of a run saw, byte by byte, kept for its auditor alone.

``RUN/observations`` holds for every round the state that was sent
(``0003-state.sealed``) and each client's answer (``0003-client-12.sealed``), as they
were on the wire. The server, which writes them, cannot open them.

**Not guaranteed**: who wrote a record. Whoever can write to the folder and knows the
auditor's public key may replace a record wholly, and the new one opens as well.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import x25519

from fedpeft.durable import write_atomically
from fedpeft.errors import DataError
from fedpeft.keys import seal, unseal

FOLDER = "observations"

_NAME = re.compile(r"(\d+)-(?:state|client-(\d+))[.]sealed")
_LENGTH = struct.Struct("<I")

Header = Mapping[str, str | int]


@dataclass(frozen=True)
class Recorder:
    """Writes records of one run.

    **Guarantees**: a record that is there is whole, and on disk when the method
    returns. A round that is done again replaces its own.

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
        self._write(_state_name(server_round), {}, payload)

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
        self._write(_answer_name(server_round, client), header, payload)

    def _write(self, name: str, header: Header, payload: bytes) -> None:
        text = json.dumps(dict(header)).encode()
        data = _LENGTH.pack(len(text)) + text + payload
        sealed = seal(data, self.auditor, f"{self.run}/{name}")
        write_atomically(self.output / FOLDER / name, sealed)


@dataclass(frozen=True)
class Answer:
    """One client's answer in one round, as it was on the wire."""

    server_round: int
    client: int
    header: Header
    payload: bytes


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
    """Opens everything that a run kept.

    Raises:
        DataError: if it kept nothing, a record does not open or is none inside, a
            name is not as :class:`Recorder` writes it, or a round's state is missing.
    """
    folder = output / FOLDER
    names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    if not found:
        raise DataError(
            f"Expected observations in {folder}, found none: the run was not recorded. "
            "Run it with [audit] record = true, or audit its scenario instead."
        )
    states, answers = {}, []
    for match in found:
        server_round, client = _round_and_client(match, folder)
        header, payload = _read(folder / match[0], run, key)
        if client is None:
            states[server_round] = payload
        else:
            answers.append(Answer(server_round, client, header, payload))
    for answer in answers:
        if answer.server_round not in states:
            raise DataError(
                f"Expected {_state_name(answer.server_round)} in {folder} beside the "
                "answers of its round, found none: the records are incomplete."
            )
    answers.sort(key=lambda answer: (answer.server_round, answer.client))
    return Records(states, tuple(answers))


def _round_and_client(match: re.Match[str], folder: Path) -> tuple[int, int | None]:
    """Returns what a name says, of which there is one spelling alone."""
    server_round = int(match[1])
    client = None if match[2] is None else int(match[2])
    name = _state_name(server_round)
    if client is not None:
        name = _answer_name(server_round, client)
    if match[0] != name:
        raise DataError(
            f"Expected {name} in {folder}, got {match[0]}: a record has one name, so "
            "this one was renamed or made by hand."
        )
    return server_round, client


def _read(path: Path, run: str, key: x25519.X25519PrivateKey) -> tuple[Header, bytes]:
    try:
        if not path.is_file():
            raise DataError(f"Expected a file at {path}, got none: move it away.")
        sealed = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the record {path}: {error.strerror}.") from None
    return _parse(unseal(sealed, key, f"{run}/{path.name}"), path)


def _parse(data: bytes, path: Path) -> tuple[Header, bytes]:
    """Takes a record apart; that it opened says nothing of who made it."""
    start = _LENGTH.size
    end = start + int.from_bytes(data[:start], "little")
    if len(data) < max(start, end):
        raise DataError(
            f"Expected a header of {end - start} bytes in {path}, got "
            f"{max(0, len(data) - start)} bytes in all: no recorder wrote this."
        )
    try:
        header = json.loads(data[start:end])
    except (RecursionError, ValueError):
        header = None
    if not isinstance(header, dict) or not all(
        isinstance(value, str | int) for value in header.values()
    ):
        raise DataError(
            f"Expected a header of names, texts and whole numbers in {path}, got "
            "something else: no recorder wrote this."
        )
    return header, data[end:]


def _state_name(server_round: int) -> str:
    return f"{server_round:04d}-state.sealed"


def _answer_name(server_round: int, client: int) -> str:
    return f"{server_round:04d}-client-{client}.sealed"
