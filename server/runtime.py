"""What the round loop knows of where it runs: in a simulation, next to nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeft.tensors import Tensors
from server.checkpoint import Progress


def _ignore(progress: Progress) -> None:
    pass


@dataclass(frozen=True)
class Runtime:
    """The facts of one runtime; the defaults are those of a simulation.

    Attributes:
        deadline_seconds: that a round waits for answers; None waits for all.
        nodes: the Flower node of every client, in their order; empty where nodes are
            numbered as the clients are, from 1.
        held_out: a file of the server's own public data to judge models on; None takes
            the scenario's own test split.
        busy: clients that still work on a request whose round is over.
        connections: client -> how often it has connected.
        name: what a client is called in the log.
        late: answers, so far, that came after their round was over.
        should_stop: whether the run is to end, at the next round's start.
        watch: is told of the progress before the first round and after each.
        spent: the worst client's epsilon over all runs, where the ledgers can be read;
            without it the result states the plan's price of the rounds asked for.
        workers_memory: peak bytes of client processes on this machine.
        auditor: the public key of who audits a simulation on public data, for whom
            everything is kept; None leaves that to the configuration.
        local_parts: what each client keeps to itself; empty for one that has not taken
            part yet. None where it cannot be read: everywhere but in a simulation.
    """

    deadline_seconds: float | None = None
    nodes: Sequence[int] = ()
    held_out: Path | None = None
    busy: Callable[[], set[int]] = set
    connections: Callable[[], dict[int, int]] = dict
    name: Callable[[int], str] = str
    late: Callable[[], int] = int
    should_stop: Callable[[], bool] = bool
    watch: Callable[[Progress], None] = _ignore
    spent: Callable[[], float] | None = None
    workers_memory: Callable[[], int] = int
    auditor: str | None = None
    local_parts: Callable[[], list[Tensors]] | None = None


SIMULATION = Runtime()
"""Everybody is here, nobody waits."""
