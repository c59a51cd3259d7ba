"""The outbox: answers that are final before anyone hears of them.

One file an answer, written whole or not at all: the payload's bytes, the memory that
goes with them, and the ledger entry that will charge them. It is on disk before the
entry is, and the entry before anything is sent.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedpeft.durable import write_atomically
from fedpeft.errors import LedgerError
from fedpeft.privacy.ledger import REMEDY, Entry, Ledger
from fedpeft.tensors import Tensors, with_prefix, without_prefix


@dataclass(frozen=True)
class Memory:
    """What a client carries from one answer of a run to the next; it never leaves.

    Attributes:
        residual: what compression lost of the updates so far, for error feedback.
        local: the trained tensors that stay at the client.
    """

    residual: Tensors = field(default_factory=dict)
    local: Tensors = field(default_factory=dict)


NOTHING = Memory()
"""Before a run's first answer."""


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        entry: sealed; names run, round and request.
        payload: the bytes to send, now and whenever asked again.
        memory: the client's, after this answer.
    """

    entry: Entry
    payload: bytes
    memory: Memory


class Outbox:
    """The answers of one data source that are not known to be needed no more."""

    def __init__(self, state: Path, data_source: str) -> None:
        self._folder = state / "outbox" / data_source

    def put(self, record: Record) -> None:
        """Writes a record durably."""
        payload = torch.from_numpy(np.frombuffer(record.payload, np.uint8).copy())
        tensors = {
            "payload": payload,
            **with_prefix("residual", record.memory.residual),
            **with_prefix("local", record.memory.local),
        }
        data = save(tensors, metadata={"entry": record.entry.to_json()})
        write_atomically(self._path(record.entry.run, record.entry.round), data)

    def find(self, run: str, server_round: int) -> Record | None:
        """Returns the answer given in a round, if it is still kept."""
        path = self._path(run, server_round)
        return _read(path) if path.exists() else None

    def newest(self, run: str) -> Record | None:
        """Returns the answer of the run's latest round."""
        paths = self._paths(run)
        return _read(paths[-1]) if paths else None

    def records(self) -> list[Record]:
        """Returns all records, of every run, in order of their names."""
        return [_read(path) for path in sorted(self._folder.glob("*.safetensors"))]

    def discard(self, run: str, until_round: int) -> None:
        """Deletes a run's answers up to a round, but never its newest.

        The newest holds the client's memory.
        """
        for path in self._paths(run)[:-1]:
            if int(path.stem.rpartition("-")[2]) <= until_round:
                path.unlink()

    def forget(self, run: str, known: set[str]) -> None:
        """Deletes a run's answers, its newest too, if among the `known` hashes."""
        for path in self._paths(run):
            if _read(path).entry.hash in known:
                path.unlink()

    def unknown(self, known: set[str]) -> tuple[list[Entry], int]:
        """Returns the entries of records not among the `known` hashes.

        Returns:
            The entries, and how many records cannot be read at all.
        """
        entries, unreadable = [], 0
        for path in self._folder.glob("*.safetensors"):
            try:
                entry = _read(path).entry
            except LedgerError:
                unreadable += 1
                continue
            if entry.hash not in known:
                entries.append(entry)
        return entries, unreadable

    def keep_only(self, known: set[str]) -> None:
        """Deletes records that are damaged or not among the `known` hashes."""
        for path in self._folder.glob("*.safetensors"):
            try:
                is_known = _read(path).entry.hash in known
            except LedgerError:
                is_known = False
            if not is_known:
                path.unlink()

    def _path(self, run: str, server_round: int) -> Path:
        return self._folder / f"{run}-{server_round:09d}.safetensors"

    def _paths(self, run: str) -> list[Path]:
        return sorted(self._folder.glob(f"{run}-*.safetensors"))


def unrecorded(ledger: Ledger, records: list[Record]) -> list[Record]:
    """Returns the records that a crash kept from the ledger: one, or none.

    Raises:
        LedgerError: if a record cannot continue the ledger.
    """
    known = {entry.hash for entry in ledger.entries}
    missing = [record for record in records if record.entry.hash not in known]
    if len(missing) > 1 or any(r.entry.previous != ledger.head for r in missing):
        raise LedgerError(
            f"The outbox of {ledger.data_source} holds answers that its ledger does "
            f"not know: the ledger was restored from a backup. {REMEDY}"
        )
    return missing


def read_memory(state: Path, data_source: str, run: str) -> Memory:
    """Returns a client's memory of a run, and changes nothing: for a simulation.

    Raises:
        LedgerError: if the newest answer is damaged.
    """
    record = Outbox(state, data_source).newest(run)
    return record.memory if record else NOTHING


def _read(path: Path) -> Record:
    try:
        with safe_open(path, framework="pt") as file:
            entry = Entry.from_json((file.metadata() or {})["entry"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        payload = tensors["payload"].numpy().tobytes()
        if payload and hashlib.sha256(payload).hexdigest() != entry.payload_hash:
            raise ValueError("its payload is not the one that was charged")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise LedgerError(f"The outbox record {path} is damaged: {error}.") from None
    memory = Memory(
        without_prefix("residual", tensors), without_prefix("local", tensors)
    )
    return Record(entry, payload, memory)
