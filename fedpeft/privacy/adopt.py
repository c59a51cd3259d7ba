"""An operator's way out of a damaged ledger: keep what holds, charge what is lost."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedpeft.durable import write_atomically
from fedpeft.errors import LedgerError
from fedpeft.privacy.ledger import (
    GENESIS,
    Entry,
    Ledger,
    ledger_path,
    locked,
    open_ledger,
    parse_entry,
    read_head,
)
from fedpeft.privacy.outbox import Outbox


@dataclass(frozen=True)
class Adoption:
    """What was done.

    Attributes:
        kept: entries whose chain holds.
        charged: entries appended in place of lost ones.
        backup: where the damaged file is now; None if there was none.
    """

    kept: int
    charged: int
    backup: Path | None


def verify(state: Path, data_source: str) -> Ledger:
    """Returns the ledger if it, its head and its outbox agree.

    Raises:
        LedgerError: if they do not.
    """
    with locked(state, data_source):
        records = Outbox(state, data_source).records()
        ledger = open_ledger(state, data_source, expected=bool(records))
        known = {entry.hash for entry in ledger.entries} | {ledger.head}
        for record in records:
            if not {record.entry.hash, record.entry.previous} & known:
                raise LedgerError(
                    f"The outbox of {data_source} holds answers that its ledger does "
                    "not know: the ledger was restored from a backup."
                )
        return ledger


def adopt(state: Path, data_source: str) -> Adoption:
    """Makes a damaged ledger usable again without ever showing less than was released.

    **Guarantees**: entries before the first damage stay. Each entry that the head, the
    file's own lines or the outbox show to have existed beyond them is charged again, at
    the price of the costliest known one; if none is known, its price is infinite and no
    private release is possible any more. Not guaranteed: releases of which no trace is
    left. The damaged file is kept beside the new one.
    """
    with locked(state, data_source):
        path = ledger_path(state, data_source)
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = _whole_entries(lines)
        outbox = Outbox(state, data_source)
        loose = outbox.drop_unknown({entry.hash for entry in kept})
        length = _head_length(state, data_source)
        lost = max(length, len(lines), len(kept) + loose) - len(kept)
        backup = None
        if path.exists() and lost:
            backup = path.with_suffix(f".damaged-{len(kept)}-{len(lines)}")
            shutil.copy2(path, backup)
        ledger = Ledger(state, data_source, [])
        write_atomically(path, b"".join(e.to_json().encode() + b"\n" for e in kept))
        ledger.entries.extend(kept)
        price = _costliest(kept, data_source)
        for _ in range(lost):
            ledger.append(price.sealed(ledger.head))
        ledger.write_head()
        return Adoption(len(kept), lost, backup)


def _whole_entries(lines: list[bytes]) -> list[Entry]:
    entries: list[Entry] = []
    previous = GENESIS
    for line in lines:
        entry = parse_entry(line, previous)
        if entry is None:
            break
        entries.append(entry)
        previous = entry.hash
    return entries


def _head_length(state: Path, data_source: str) -> int:
    try:
        head = read_head(state, data_source)
    except LedgerError:
        return 0
    return head[0] if head else 0


def _costliest(kept: list[Entry], data_source: str) -> Entry:
    """Returns a template for lost entries."""
    private = [entry for entry in kept if entry.noise_multiplier > 0]
    if private:
        # Rate and steps over noise order single releases by cost well enough here: a
        # ledger holds few distinct plans, and all three are taken at their worst.
        worst = dataclasses.replace(
            private[-1],
            noise_multiplier=min(e.noise_multiplier for e in private),
            sampling_rate=max(e.sampling_rate for e in private),
            steps=max(e.steps for e in private),
        )
    else:
        worst = Entry(
            run="",
            round=0,
            data_source=data_source,
            unit="none",
            relation="none",
            mechanism="none",
            noise_multiplier=0.0,
            sampling_rate=1.0,
            steps=1,
            clipping_norm=None,
            backbone="",
            plan_hash="",
            request_hash="",
            payload_hash="",
        )
    return dataclasses.replace(
        worst, run="", round=0, mechanism="adopted", request_hash="", payload_hash=""
    )
