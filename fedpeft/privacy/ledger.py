"""The privacy ledger: what a data source has released, in all runs, for ever.

One JSON line a release, appended and fsynced, each holding the hash of the one before.
The newest hash and the length also stand in a second file (the *head*), so that a
ledger that was deleted, shortened, restored from a backup or edited is noticed. It
belongs to the client; no server holds it.

    STATE/ledger/SOURCE.jsonl   the entries
    STATE/heads/SOURCE.json     length and hash of the newest
    STATE/heads/SOURCE.lock     held while an answer is computed
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpeft.durable import append_durably, write_atomically
from fedpeft.errors import LedgerError
from fedpeft.privacy.accountant import Composition, epsilon

FORMAT = 1
"""An entry of format 1 stays as it is for ever: its hash is over its own bytes."""

GENESIS = "0" * 64
"""What the first entry names as its predecessor."""

SEEDED = "gaussian-seeded"
"""The mechanism of a release whose noise a seed repeats."""

TRUSTED_SERVER = "trusted-server"
"""The mechanism of an answer that the server promised to clip and to noise."""

REMEDY = (
    "Inspect it with `fedpeft ledger verify`; an operator who answers for the data may "
    "then run `fedpeft ledger adopt`."
)


@dataclass(frozen=True)
class Entry:
    """One release.

    Attributes:
        mechanism: ``gaussian`` (Poisson-subsampled, `steps` times), ``gaussian-seeded``
            (the same, with noise that a seed repeats), ``none`` (released
            without privacy: epsilon is infinite from here on), ``trusted-server``
            (clipped and noised there: nobody here can verify it), or ``adopted``
            (charged in place of an entry that was lost).
        noise_multiplier: unitless; 0 for ``none``.
        clipping_norm: None for ``none``.
        backbone: fingerprint of the frozen model.
        nonce: 128 random bits that never leave the client: the hash does, and without
            them it would tell which data, named by `data_source`, an entry speaks of.
        previous: hash of the entry before.
        hash: sha256 over all the rest.
    """

    run: str
    round: int
    data_source: str
    unit: str
    relation: str
    mechanism: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    clipping_norm: float | None
    backbone: str
    plan_hash: str
    request_hash: str
    payload_hash: str
    nonce: str = ""
    format: int = FORMAT
    previous: str = ""
    hash: str = ""

    def sealed(self, previous: str) -> "Entry":
        """Returns the entry chained to `previous`, with its hash."""
        chained = dataclasses.replace(self, previous=previous, hash="")
        digest = hashlib.sha256(chained.to_json().encode()).hexdigest()
        return dataclasses.replace(chained, hash=digest)

    def to_json(self) -> str:
        """Returns one line, without its end."""
        fields = dataclasses.asdict(self)
        if not self.nonce:  # entries written before there was one keep their hash
            del fields["nonce"]
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> "Entry":
        """Reads :meth:`to_json`.

        Raises:
            ValueError: for anything else.
        """
        fields = json.loads(line)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f"Expected a ledger entry of format {FORMAT}.")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(str(error)) from None

    @property
    def composition(self) -> Composition:
        """What the accountant makes of it."""
        sampling: Literal["poisson", "fixed"] = (
            "fixed" if self.relation == "replace-one" else "poisson"
        )
        return Composition(
            self.noise_multiplier, self.sampling_rate, self.steps, sampling
        )


class Ledger:
    """The verified entries of one data source; see :func:`open_ledger`."""

    def __init__(self, state: Path, data_source: str, entries: list[Entry]) -> None:
        self._state = state
        self.data_source = data_source
        self.entries = entries

    @property
    def head(self) -> str:
        """The newest entry's hash."""
        return self.entries[-1].hash if self.entries else GENESIS

    def append(self, entry: Entry) -> None:
        """Puts a sealed entry on disk, then moves the head.

        Raises:
            LedgerError: if the entry does not continue the chain.
        """
        if entry != entry.sealed(self.head):
            raise LedgerError(
                f"Expected an entry that continues the ledger of {self.data_source}, "
                f"got one of another history. {REMEDY}"
            )
        append_durably(ledger_path(self._state, self.data_source), to_lines([entry]))
        self.entries.append(entry)
        self.write_head()

    def write_head(self) -> None:
        """Records length and newest hash in the second file."""
        head = {"length": len(self.entries), "hash": self.head}
        path = head_path(self._state, self.data_source)
        write_atomically(path, json.dumps(head).encode())

    def spent(self, delta: float) -> float:
        """Returns the epsilon of everything released so far, at `delta`."""
        return epsilon((entry.composition for entry in self.entries), delta)


def open_ledger(state: Path, data_source: str, *, expected: bool = False) -> Ledger:
    """Reads and verifies a ledger; a new one is empty.

    A torn last line (a crash in the middle of an append) is repaired once everything
    else holds: its release was not sent, and its outbox record, written before,
    restores it.

    Args:
        state: the client's state directory.
        data_source: whose ledger.
        expected: whether other traces of an earlier release exist.

    Raises:
        LedgerError: if it is missing though it should be there, shorter than its head
            says, or altered.
    """
    path = ledger_path(state, data_source)
    head = read_head(state, data_source)
    if not path.exists():
        if head is not None or expected:
            raise LedgerError(
                f"Expected the ledger of {data_source} at {path}, found none, though "
                f"it has released before. {REMEDY}"
            )
        return Ledger(state, data_source, [])
    data = path.read_bytes()
    entries, rest = read_chain(data)
    check_format(path, rest)
    if b"\n" in rest:
        raise LedgerError(
            f"{path}, line {len(entries) + 1}: the chain is broken here; the ledger "
            f"was edited or damaged. {REMEDY}"
        )
    _compare_with_head(path, entries, head)
    if rest or not data.endswith(b"\n"):
        write_atomically(path, to_lines(entries))
    ledger = Ledger(state, data_source, entries)
    if head is None or len(entries) > head[0]:  # a crash between entry and head
        ledger.write_head()
    return ledger


def ledger_as_it_stands(state: Path, data_source: str) -> Ledger:
    """Reads a ledger and mends nothing: what lacks an entry at this moment lacks it."""
    path = ledger_path(state, data_source)
    entries, _ = read_chain(path.read_bytes() if path.exists() else b"")
    return Ledger(state, data_source, entries)


def check_format(path: Path, rest: bytes) -> None:
    """Tells an entry of a later version from a damaged one.

    Raises:
        LedgerError: if the first of these bytes are one.
    """
    try:
        found = json.loads(rest.splitlines()[0])["format"]
    except (IndexError, ValueError, KeyError, TypeError):
        return
    if isinstance(found, int) and found > FORMAT:
        raise LedgerError(
            f"{path} was written by a newer fedpeft, in format {found}; this one reads "
            f"up to {FORMAT}: update it. Nothing is wrong with the ledger."
        )


def _compare_with_head(
    path: Path, entries: list[Entry], head: tuple[int, str] | None
) -> None:
    if head is None:
        if len(entries) > 1:
            raise LedgerError(f"Expected a head beside {path}, found none. {REMEDY}")
        return
    length, newest = head
    if len(entries) < length:
        raise LedgerError(
            f"Expected {length} entries in {path}, found {len(entries)}: it was "
            f"shortened or restored from a backup. {REMEDY}"
        )
    if length and entries[length - 1].hash != newest:
        raise LedgerError(f"{path} is not the ledger that its head knows. {REMEDY}")


@contextlib.contextmanager
def locked(state: Path, data_source: str) -> Iterator[None]:
    """Holds the data source for this process; waits for another to finish."""
    path = head_path(state, data_source).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ledger_path(state: Path, data_source: str) -> Path:
    """Where the entries are."""
    return state / "ledger" / f"{data_source}.jsonl"


def head_path(state: Path, data_source: str) -> Path:
    """Where length and newest hash are."""
    return state / "heads" / f"{data_source}.json"


def data_sources(state: Path) -> list[str]:
    """Returns every data source of which any trace exists, sorted."""
    ledgers = (state / "ledger").glob("*.jsonl")
    heads = (state / "heads").glob("*.json")
    outboxes = (state / "outbox").glob("*")
    names = {path.stem for path in (*ledgers, *heads)}
    return sorted(names | {path.name for path in outboxes})


def read_head(state: Path, data_source: str) -> tuple[int, str] | None:
    """Returns length and newest hash, None if there is no head.

    Raises:
        LedgerError: if the file is not a head.
    """
    path = head_path(state, data_source)
    if not path.exists():
        return None
    try:
        head = json.loads(path.read_bytes())
        return int(head["length"]), str(head["hash"])
    except (ValueError, KeyError, TypeError):
        raise LedgerError(f"{path} is damaged. {REMEDY}") from None


def read_chain(data: bytes) -> tuple[list[Entry], bytes]:
    """Returns the entries from the start whose chain holds, and the bytes after them.

    A last line that lacks only its end counts.
    """
    entries: list[Entry] = []
    previous = GENESIS
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines):
        entry = _parse(line, previous)
        if entry is None:
            return entries, b"".join(lines[number:])
        entries.append(entry)
        previous = entry.hash
    return entries, b""


def to_lines(entries: Iterable[Entry]) -> bytes:
    """Returns the content of a ledger file."""
    return b"".join(entry.to_json().encode() + b"\n" for entry in entries)


def _parse(line: bytes, previous: str) -> Entry | None:
    try:
        entry = Entry.from_json(line.decode())
    except ValueError:
        return None
    return entry if entry == entry.sealed(previous) else None
