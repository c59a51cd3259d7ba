"""Writing that survives a crash."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file: after a crash it holds the old bytes or the new, never a part.

    The bytes and the directory entry are on disk when this returns.

    Raises:
        OSError: for example on a full disk; the old file is untouched.
    """
    make_directory(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with _named(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def append_durably(path: Path, data: bytes) -> None:
    """Appends bytes that are on disk when this returns; a crash may leave a part."""
    make_directory(path.parent)
    created = not path.exists()
    with _named(path), path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if created:
        sync_directory(path.parent)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Has an error say which file it is about: one of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, each durably in its own parent."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Puts a directory's entries on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
