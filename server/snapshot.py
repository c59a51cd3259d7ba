"""What a server knows of its run at one moment, and what of it may be seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FORMAT = "fedpeft-status/1"
State = Literal["waiting", "running", "stopping", "complete", "stopped"]

_COUNTS = ("cohort_size", "replies", "failures")
_BYTES = ("bytes_up", "bytes_down", "entropy_bytes")
_RECORD = ("round", *_COUNTS, *_BYTES, "seconds", "metric")
_PRIVACY = (
    *("unit", "relation", "holds_against", "noise"),
    *("target_epsilon", "target_delta", "planned_epsilon", "spent_epsilon"),
)
# What a client gets before it is ever asked: it says nothing of a cohort.
_BEFORE_ANY_ROUND = (
    *("unknown-client", "name-mismatch", "protocol-version"),
    *("plan-not-accepted", "no-slot"),
)


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        run: the run's id.
        state: what the server is doing.
        server_round: rounds done.
        rounds: that there will be.
        metric: its name.
        records: one a round, as in ``events.jsonl``; values may be None.
        connected: names of the clients whose connection stands.
        expected: how many clients the run has.
        codes: how often each code of refusal or failure was seen.
        privacy: as in ``result.json``; None without any.
        started: when the server started, in seconds since the epoch.
        seconds_left: an estimate, if there is one.
    """

    run: str
    state: State
    server_round: int
    rounds: int
    metric: str
    records: Sequence[Mapping[str, Any]]
    connected: Sequence[str]
    expected: int
    codes: Mapping[str, int]
    privacy: Mapping[str, Any] | None
    started: float
    seconds_left: float | None


def view(snapshot: Snapshot) -> dict[str, Any]:
    """Returns all that may be seen of a snapshot, by the names of its fields.

    Added are `format`, `hides_clients`, `value` (the latest metric) and the sums
    `bytes_up` and `bytes_down`.

    **Guarantees.** Keys that are not named here are dropped. Where the unit of privacy
    is the client, these are None or absent, whatever the snapshot holds: how many were
    asked, answered or failed, bytes, seconds and what is computed from them, and every
    code that only a client at work on a request can cause.
    """
    privacy = snapshot.privacy
    if privacy is not None and privacy["unit"] == "none":
        privacy = None
    hides_clients = privacy is not None and privacy["unit"] == "client"
    shown = ("round", "metric") if hides_clients else _RECORD
    records = [
        {key: record.get(key) if key in shown else None for key in _RECORD}
        for record in snapshot.records
    ]
    values = [record["metric"] for record in records if record["metric"] is not None]
    codes = {
        code: count
        for code, count in sorted(snapshot.codes.items())
        if not hides_clients or code in _BEFORE_ANY_ROUND
    }
    return {
        "format": FORMAT,
        **vars(snapshot),
        "records": records,
        "connected": sorted(snapshot.connected),
        "codes": codes,
        "privacy": privacy and {key: privacy.get(key) for key in _PRIVACY},
        "seconds_left": None if hides_clients else snapshot.seconds_left,
        "hides_clients": hides_clients,
        "value": values[-1] if values else None,
        "bytes_up": None if hides_clients else _total(records, "bytes_up"),
        "bytes_down": None if hides_clients else _total(records, "bytes_down"),
    }


def _total(records: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(record[key] or 0 for record in records)
