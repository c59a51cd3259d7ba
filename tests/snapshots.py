"""A run to watch, made by hand."""

from dataclasses import replace
from typing import Any

from server.status import Snapshot

PRIVACY = {
    "unit": "example",
    "relation": "add-or-remove-one",
    "target_epsilon": 8.0,
    "target_delta": 1e-5,
    "planned_epsilon": 7.5,
    "spent_epsilon": 2.0,
    "noise": "secure",
    "holds_against": "everybody",
}
CLIENT_LEVEL = {
    **PRIVACY,
    "unit": "client",
    "holds_against": "everybody but the server",
}


def record(server_round: int, **changes: Any) -> dict[str, Any]:
    """A round in which three of four answered, ten bytes each; 0.5, 0.51, 0.52, ..."""
    return {
        "round": server_round,
        "cohort_size": 4,
        "replies": 3,
        "failures": 1,
        "bytes_up": 30,
        "bytes_down": 400,
        "entropy_bytes": 29,
        "seconds": 7.0,
        "metric": 0.49 + server_round / 100,
        **changes,
    }


def snapshot(rounds_done: int = 2, **changes: Any) -> Snapshot:
    """A run of 20 rounds after some of them."""
    whole = Snapshot(
        run="5f0c9a12d4e84b71",
        state="running",
        server_round=rounds_done,
        rounds=20,
        metric="accuracy",
        records=[record(number) for number in range(1, rounds_done + 1)],
        connected=["hospital-b", "hospital-a"],
        expected=3,
        codes={"unknown-client": 2, "late": 5},
        privacy=PRIVACY,
        started=1_000_000_000.0,
        seconds_left=126.0,
    )
    return replace(whole, **changes)
