"""Which clients take part in a round: in public, or in secret."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.durable import write_atomically
from fedpeft.privacy import Randomness, poisson_batch, sample


def rotation(
    server_round: int,
    size: int,
    num_clients: int,
    without: Set[int] = frozenset(),
    at_least: int = 0,
) -> list[int]:
    """Returns the cohort of a round, from 1, in a public rotation, sorted.

    The places of clients in `without` stay empty, unless fewer than `at_least` would be
    left; then the next in the rotation step in. They do not otherwise, since every
    round that a client takes over is one that it lacks at the end.

    **Guarantees**: with nobody passed over, a client takes part in any number of rounds
    at most ``ceil(rounds * size / num_clients)`` times, and the numbers of two of its
    rounds differ by at least ``num_clients // size``: the privacy plan counts on both.
    The epsilon of an example gains nothing from who is in a cohort, so there is nothing
    to hide and nothing to draw.

    >>> rotation(1, 2, 5), rotation(2, 2, 5), rotation(3, 2, 5)
    ([0, 1], [2, 3], [0, 4])
    >>> rotation(1, 2, 5, without={1}), rotation(1, 2, 5, without={1}, at_least=2)
    ([0], [0, 2])
    """
    first = (server_round - 1) * size
    order = [(first + i) % num_clients for i in range(num_clients)]
    seated = [client for client in order[:size] if client not in without]
    spare = [client for client in order[size:] if client not in without]
    return sorted(seated + spare[: max(0, at_least - len(seated))])


def drawn(config: RunConfig, randomness: Randomness) -> list[int]:
    """Returns a cohort drawn in secret, sorted; a Poisson cohort may be empty.

    **Guarantees**: independent of all other rounds, of data and of replies, which is
    what amplification by sampling assumes.
    """
    size, num_clients = config.cohort.size, config.partition.num_clients
    if config.cohort.sampling == "fixed":
        return sample(range(num_clients), size, randomness)
    return poisson_batch(num_clients, size / num_clients, randomness)


class SecretFile:
    """What only the server may know of its rounds, in a file that only it can read.

    A cohort stands here before anyone is asked, so that a resumed round asks the same
    clients: a second draw would depend on what became of the first.

    Args:
        path: one JSON line an event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cohort(
        self, config: RunConfig, server_round: int, randomness: Randomness
    ) -> list[int]:
        """Returns the round's cohort: as drawn before, or drawn now."""
        for event in self._events():
            if event["round"] == server_round and "cohort" in event:
                known: list[int] = event["cohort"]
                return known
        clients = drawn(config, randomness)
        self.note({"round": server_round, "cohort": clients})
        return clients

    def note(self, event: dict[str, Any]) -> None:
        """Adds an event; it is on disk, whole, when this returns."""
        events = [*self._events(), event]
        text = "".join(json.dumps(event) + "\n" for event in events)
        write_atomically(self.path, text.encode())  # readable by its owner alone

    def _events(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]
