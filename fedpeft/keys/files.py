"""Key files: read with care, written once.

**Guarantees**: a key file is readable by its owner alone from its first byte on; a file
is in place whole or not at all; none is overwritten, but for a renewal, which keeps
copies.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fedpeft.durable import make_directory, sync_directory
from fedpeft.errors import ConfigError


def read_file(path: Path) -> bytes:
    """Returns a file's bytes; a missing one is a ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def read_secret(path: Path) -> bytes:
    """Returns a key file's bytes, if nobody but its owner could."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            data = file.read()
    except OSError as error:
        raise _unreadable(path, error) from None
    if mode & 0o077:
        raise ConfigError(
            f"Expected a key that its owner alone can read, got mode {mode:04o} of "
            f"{path}: run `chmod 600 {path}`."
        )
    return data


def write_files(
    folder: Path, files: Mapping[str, bytes], *, replace: bool = False
) -> None:
    """Puts files in place: durably, each whole, one right after the other.

    Raises:
        ConfigError: if one is there and is not to be replaced; all are left alone.
    """
    for name in files:
        if (folder / name).exists() and not replace:
            raise _occupied(folder / name)
    make_directory(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as room:
        for name, data in files.items():
            with open(Path(room, name), "xb", opener=_for_its_owner) as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o600 if ".key" in name else 0o644)
                os.fsync(file.fileno())
        for name in files:
            try:
                # A link, unlike a rename, fails if the name was taken meanwhile.
                (os.replace if replace else os.link)(Path(room, name), folder / name)
            except FileExistsError:
                raise _occupied(folder / name) from None
    sync_directory(folder)


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _occupied(path: Path) -> ConfigError:
    return ConfigError(
        f"Expected no file at {path} yet, found one and left it alone: take another "
        f"--folder; --renew replaces a certificate and keeps the old one beside."
    )


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"Cannot read {path}: {error.strerror}; make it with `fedpeft keys`, or mend "
        f"its path."
    )
