"""Who may take part: a file of names and fingerprints that its owner edits at any time.

    [clients]
    hospital-a = ["sha256:<64 hexadecimal digits>"]

Two fingerprints stand at a name while a certificate is renewed; a name without any is
admitted by nobody's certificate.
"""

import logging
import re
import threading
import tomllib
from pathlib import Path

from fedpeft.errors import ConfigError
from fedpeft.keys import NAME

logger = logging.getLogger(__name__)

_FINGERPRINT = re.compile("sha256:[0-9a-f]{64}")


class AllowList:
    """The clients of a federation, as the file says at the moment one asks.

    The file is small, so it is read at every question and parsed when its bytes have
    changed: no clock and no file system can hide a change.

    **Guarantees**: who is taken off the list is not admitted from the next question on.
    A file that is broken or gone changes nothing but one warning in the log, so a slip
    of the editor does not end a run; nor does it take anybody off.

    Args:
        path: a TOML file.

    Raises:
        ConfigError: if the file is broken from the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._seen = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"Cannot read the allow list {path}: {error.strerror}; `fedpeft keys "
                f"client NAME` prints its lines."
            ) from None
        self._clients = _parse(self._seen, path)

    def names(self) -> list[str]:
        """Returns the clients' names, in the file's order."""
        return list(self._current())

    def admits(self, name: str, fingerprint: str | None) -> bool:
        """Whether a client may take part, or go on to.

        Args:
            name: as its certificate says.
            fingerprint: of its certificate; None where there are no certificates, on
                loopback: then the name is enough.
        """
        prints = self._current().get(name)
        return prints is not None and (fingerprint is None or fingerprint in prints)

    def _current(self) -> dict[str, tuple[str, ...]]:
        with self._lock:
            try:
                data = self._path.read_bytes()
            except OSError:
                data = b""  # as broken as an empty file
            if data != self._seen:
                self._seen = data
                self._take(data)
            return self._clients

    def _take(self, data: bytes) -> None:
        try:
            self._clients = _parse(data, self._path)
        except ConfigError as error:
            logger.warning("allow_list=broken clients=unchanged error=%s", error)
        else:
            logger.info("allow_list=changed clients=%d", len(self._clients))


def _parse(data: bytes, path: Path) -> dict[str, tuple[str, ...]]:
    try:
        table = tomllib.loads(data.decode())
    except ValueError as error:  # no UTF-8, or no TOML
        raise ConfigError(f"The allow list {path} is no TOML: {error}.") from None
    clients = table.get("clients")
    if list(table) != ["clients"] or not isinstance(clients, dict):
        raise ConfigError(
            f"Expected one section, [clients], in the allow list {path}, got "
            f"{', '.join(table) or 'none'}."
        )
    owners: dict[str, str] = {}
    for name, prints in clients.items():
        _check_entry(name, prints, path)
        for one in prints:
            if owners.setdefault(one, name) != name:
                raise ConfigError(
                    f"Expected each fingerprint at one name in the allow list {path}, "
                    f"got {one} at {owners[one]} and {name}."
                )
    return {name: tuple(prints) for name, prints in clients.items()}


def _check_entry(name: str, prints: object, path: Path) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"Expected names of a-z, 0-9 and - in the allow list {path}, got {name!r}."
        )
    if not isinstance(prints, list) or not all(
        isinstance(one, str) and _FINGERPRINT.fullmatch(one) for one in prints
    ):
        raise ConfigError(
            f'Expected {name} = ["sha256:<64 hexadecimal digits>"] in the allow list '
            f"{path}, got {prints!r}."
        )
