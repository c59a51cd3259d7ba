"""Whom a round asks, and which clients are passed over; kept on disk.

Only for runs in which nothing is hidden: there, who takes part changes neither the
guarantee of those who do nor that of those who do not.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpeft.durable import write_atomically
from fedpeft.errors import RunError
from server.runtime import Runtime

PATIENCE = 3
"""Failures in a row after which a client is set aside."""

logger = logging.getLogger(__name__)


@dataclass
class Conduct:
    """How one client has fared.

    Attributes:
        failures: in a row, up to now.
        times: how often it was set aside.
        until: the round before which it is not asked again.
        connections: that it had when it was set aside, in this process.
    """

    failures: int = 0
    times: int = 0
    until: int = 0
    connections: int = 0

    @property
    def is_aside(self) -> bool:
        """Whether it has failed too often in a row."""
        return self.failures >= PATIENCE


class Standing:
    """What the server must not forget of its clients when it is killed.

    **Guarantees**: whoever is asked stands on disk before; a process that takes over in
    the middle of a round counts those whom the one before it asked.

    Args:
        path: one JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._round, self._asked, self._clients = _read(path)

    def ask(self, server_round: int, cohort: Iterable[int]) -> set[int]:
        """Notes whom a round asks; returns all that it has asked, in any process."""
        earlier = self._asked if server_round == self._round else set()
        self._round, self._asked = server_round, earlier | set(cohort)
        self._write()
        return self._asked

    def note(self, outcomes: Mapping[int, str], runtime: Runtime) -> None:
        """Takes in how the clients of the round answered.

        Three failures in a row set a client aside until it connects anew, and for twice
        as many rounds each time: one that always comes back and always fails would
        otherwise cost every one of its rounds the whole deadline.

        Args:
            outcomes: client -> ``ok``, or why not.
            runtime: tells how often a client has connected.
        """
        for client, outcome in outcomes.items():
            conduct = self._clients.setdefault(client, Conduct())
            conduct.failures = 0 if outcome == "ok" else conduct.failures + 1
            if not conduct.is_aside:
                continue
            conduct.times += 1
            conduct.until = self._round + 2**conduct.times
            conduct.connections = runtime.connections().get(client, 0)
            name = runtime.name(client)
            logger.warning(
                "client=%s is set aside after %d failures in a row, the last %s; it "
                "takes part again from round %d, once it connects anew",
                name,
                conduct.failures,
                outcome,
                conduct.until,
                extra={"client": name, "round": self._round, "code": outcome},
            )
        self._write()

    def passed_over(self, server_round: int, runtime: Runtime) -> set[int]:
        """Returns the clients that are busy with an old request, or set aside."""
        connections = runtime.connections()
        for client, conduct in self._clients.items():
            is_back = connections.get(client, 0) > conduct.connections
            if conduct.is_aside and is_back and server_round >= conduct.until:
                conduct.failures = PATIENCE - 1  # one more chance
        aside = {c for c, conduct in self._clients.items() if conduct.is_aside}
        return runtime.busy() | aside

    def _write(self) -> None:
        clients = {str(c): asdict(conduct) for c, conduct in self._clients.items()}
        facts = {"round": self._round, "asked": sorted(self._asked), "clients": clients}
        write_atomically(self._path, json.dumps(facts).encode())


def _read(path: Path) -> tuple[int, set[int], dict[int, Conduct]]:
    """Reads what an earlier process wrote; in this one nobody has connected yet."""
    if not path.exists():
        return 0, set(), {}
    try:
        facts = json.loads(path.read_bytes())
        clients = {
            int(c): Conduct(**conduct) for c, conduct in facts["clients"].items()
        }
        asked = {int(client) for client in facts["asked"]}
        server_round = int(facts["round"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"Expected in {path} whom the last round asked, found something else: "
            "restore it; without it a client could be asked more often than planned."
        ) from None
    for conduct in clients.values():
        conduct.connections = 0
    return server_round, asked, clients
