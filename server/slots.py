"""Which client of the scenario each name is, for as long as the run lasts."""

import json
from pathlib import Path

from fedpeft.durable import write_atomically
from fedpeft.errors import RunError
from server.allowlist import AllowList


class Slots:
    """Names -> the scenario's clients, from 0; a name keeps its place once it has one.

    Args:
        path: where the places stand; those of an interrupted run go on.
        allow: in whose order names take the places that are left.
        num_clients: how many places there are.
        is_expected: whether clients have their places already.

    Raises:
        RunError: if the file is damaged, or expected and not there.
    """

    def __init__(
        self,
        path: Path,
        allow: AllowList,
        num_clients: int,
        *,
        is_expected: bool = False,
    ) -> None:
        self._path = path
        self._allow = allow
        self._num_clients = num_clients
        self._places = _read(path, is_expected=is_expected)
        self._fill()

    def index(self, name: str) -> int | None:
        """Returns a name's place; None if it is not on the list or all are taken."""
        if name not in self._places:
            self._fill()
        return self._places.get(name)

    def name(self, index: int) -> str:
        """Returns whose place it is, or the number of an empty one."""
        names = {place: name for name, place in self._places.items()}
        return names.get(index, f"client {index}")

    def revoked(self) -> set[int]:
        """Returns the places of those who are not on the list any more."""
        allowed = set(self._allow.names())
        return {i for name, i in self._places.items() if name not in allowed}

    def _fill(self) -> None:
        """Gives free places to names that are new on the list, in its order."""
        places = dict(self._places)
        for name in self._allow.names():
            if name not in places and len(places) < self._num_clients:
                places[name] = len(places)
        if places != self._places:
            write_atomically(self._path, json.dumps(places, indent=2).encode())
            self._places = places


def _read(path: Path, *, is_expected: bool) -> dict[str, int]:
    if not path.exists():
        if is_expected:
            raise RunError(
                f"Expected the clients' places in {path}, found none, though rounds "
                "are done: under other places each would be taken for another. "
                "Restore it."
            )
        return {}
    try:
        places = {str(name): int(i) for name, i in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError):
        raise RunError(
            f"Expected the clients' places in {path}, found something else: it says "
            "whose ledger is whose; restore it."
        ) from None
    if sorted(places.values()) != list(range(len(places))):
        raise RunError(f"Expected each place once in {path}; restore it.")
    return places
