"""An operator's way out of a damaged ledger: keep what holds, charge what is lost."""

import math
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedpeft.durable import write_atomically
from fedpeft.errors import LedgerError
from fedpeft.privacy.ledger import (
    GENESIS,
    SEEDED,
    Entry,
    Ledger,
    check_format,
    ledger_path,
    locked,
    open_ledger,
    read_chain,
    read_head,
    to_lines,
)
from fedpeft.privacy.outbox import Outbox, unrecorded


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

    What a crash left behind is brought up first: a torn line is cut, a head that lags
    is moved, a release that is only in the outbox is charged.

    Raises:
        LedgerError: if they do not.
    """
    with locked(state, data_source):
        records = Outbox(state, data_source).records()
        ledger = open_ledger(state, data_source, expected=bool(records))
        for record in unrecorded(ledger, records):
            ledger.append(record.entry)
        return ledger


def adopt(state: Path, data_source: str, *, acknowledged: int = 0) -> Adoption:
    """Makes a damaged ledger usable again without showing less than is known.

    **Guarantees**: entries before the first damage stay. Each entry that the head, the
    file's own lines or the outbox show to have existed beyond them is charged again, at
    the price of the costliest entry of which any trace is left; if none is known, or
    one was without privacy, the price is infinite and no private release is possible
    any more. After a crash in the middle, adopting again ends it; it may charge more
    than once, never less. Not guaranteed: releases of which no trace is left. The
    damaged file is kept beside the new one.

    Args:
        state: the client's state directory.
        data_source: whose ledger.
        acknowledged: entries that it had when a server last heard of it. A ledger that
            was restored from a backup together with its head and outbox shows no damage
            of its own: this is the only trace of what came after.
    """
    with locked(state, data_source):
        path = ledger_path(state, data_source)
        data = path.read_bytes() if path.exists() else b""
        kept, rest = read_chain(data)
        check_format(path, rest)
        outbox = Outbox(state, data_source)
        hashes = {entry.hash for entry in kept}
        loose, unreadable = outbox.unknown(hashes)
        lines = rest.splitlines()
        behind = _parseable(lines)
        seen = {entry.hash for entry in behind}
        extra = sum(entry.hash not in seen for entry in loose) + unreadable
        existed = len(kept) + len(lines) + extra
        existed = max(existed, _head_length(state, data_source), acknowledged)
        lost = existed - len(kept)
        price = _costliest([*kept, *loose, *behind], data_source)
        entries = list(kept)
        for _ in range(lost):
            previous = entries[-1].hash if entries else GENESIS
            entries.append(price.sealed(previous))
        backup = None
        if data and lost:
            backup = path.with_suffix(f".damaged-{len(kept)}-{existed}")
            shutil.copy2(path, backup)
        # Longer first: a crash between the two leaves a head that lags behind, or one
        # that does not fit and is refused; never a ledger that shows less.
        write_atomically(path, to_lines(entries))
        Ledger(state, data_source, entries).write_head()
        outbox.keep_only({entry.hash for entry in entries})
        return Adoption(len(kept), lost, backup)


def _head_length(state: Path, data_source: str) -> int:
    try:
        head = read_head(state, data_source)
    except LedgerError:
        return 0
    return head[0] if head else 0


def _parseable(lines: Iterable[bytes]) -> list[Entry]:
    """Returns what can still be read behind the damage."""
    entries = []
    for line in lines:
        try:
            entries.append(Entry.from_json(line.decode()))
        except ValueError:
            continue
    return entries


def _costliest(known: list[Entry], data_source: str) -> Entry:
    """Returns a template for lost entries: every parameter at its worst.

    An edited value that is no number, or out of range, is as dear as no noise at all.
    """
    noise = min((_number(e.noise_multiplier) for e in known), default=0.0)
    charged = {entry.run for entry in known if entry.steps}
    if any(not entry.steps and entry.run not in charged for entry in known):
        noise = 0.0  # what the run cost as a whole is among what is lost
    private = noise > 0
    return Entry(
        run="",
        round=0,
        data_source=data_source,
        unit=known[-1].unit if private else "none",
        relation=known[-1].relation if private else "none",
        mechanism=SEEDED if any(e.mechanism == SEEDED for e in known) else "adopted",
        noise_multiplier=noise,
        sampling_rate=max((_share(e.sampling_rate) for e in known), default=1.0),
        steps=max((_count(e.steps) for e in known), default=1),
        clipping_norm=known[-1].clipping_norm if private else None,
        backbone="",
        plan_hash="",
        request_hash="",
        payload_hash="",
        nonce=secrets.token_hex(16),
    )


def _number(value: object) -> float:
    if isinstance(value, float | int) and 0 < value < math.inf:
        return float(value)
    return 0.0


def _share(value: object) -> float:
    if isinstance(value, float | int) and 0 < value <= 1:
        return float(value)
    return 1.0


def _count(value: object) -> int:
    return value if type(value) is int and value > 0 else 1
