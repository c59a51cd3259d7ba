"""What the round loop lets be seen from outside, while it runs."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable

from server.checkpoint import Progress
from server.grid import GrpcGrid
from server.result import privacy_facts
from server.setup import Server
from server.snapshot import Snapshot, State

_RECENT = 5
"""Rounds over which the time left is estimated."""


class Monitor:
    """Keeps what the page shows: the loop writes, the page's thread reads.

    Attributes:
        state: what the server is doing.
    """

    def __init__(
        self, server: Server, grid: GrpcGrid, is_stopping: Callable[[], bool]
    ) -> None:
        self.state: State = "waiting"
        self._server = server
        self._grid = grid
        self._is_stopping = is_stopping
        self._started = time.time()
        self._progress = Progress(0, {}, {}, {})
        self._privacy = privacy_facts(server.config, server.plan, self._progress)

    def watch(self, progress: Progress) -> None:
        """Takes in where the loop is; a copy, since the loop goes on."""
        self._progress = dataclasses.replace(
            progress, records=list(progress.records), asked=dict(progress.asked)
        )
        config, plan = self._server.config, self._server.plan
        self._privacy = privacy_facts(config, plan, self._progress)
        if progress.server_round and self.state == "waiting":
            self.state = "running"

    @property
    def took_part(self) -> set[int]:
        """The clients of which an answer counted."""
        return set(self._progress.acknowledged)

    def snapshot(self) -> Snapshot:
        """Returns what may be shown now."""
        config, progress = self._server.config, self._progress
        return Snapshot(
            run=self._server.run,
            state="stopping" if self._is_stopping() else self.state,
            server_round=progress.server_round,
            rounds=config.run.rounds,
            metric=self._server.model.task.metric,
            records=progress.records,
            connected=self._grid.connected(),
            expected=config.partition.num_clients,
            codes=self._codes(),
            privacy=self._privacy if self._server.plan else None,
            started=self._started,
            seconds_left=self._seconds_left(),
        )

    def _codes(self) -> dict[str, int]:
        """Counts refusals at the door, and why answers did not count."""
        codes = Counter(self._grid.counts())
        if self._server.hides_clients:
            return {code: n for code, n in codes.items() if code != "late"}
        for record in self._progress.records:
            answers = {k: n for k, n in (record["codes"] or {}).items() if k != "late"}
            codes.update(answers)
        return dict(codes)

    def _seconds_left(self) -> float | None:
        recent = self._progress.records[-_RECENT:]
        seconds = [float(r["seconds"]) for r in recent if r["seconds"] is not None]
        if not seconds:
            return None
        left = self._server.config.run.rounds - self._progress.server_round
        return left * sum(seconds) / len(seconds)
