"""A run directory: held by one process, and of one run for ever."""

import contextlib
import fcntl
import uuid
from collections.abc import Iterator
from pathlib import Path

from fedpeft.config import RunConfig
from fedpeft.durable import make_directory
from fedpeft.errors import RunError

_LOCK = "run.lock"


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Holds the run directory for this process; a failed start leaves nothing.

    Raises:
        RunError: if another process holds it.
    """
    existed = output.exists()
    if existed and not output.is_dir():
        raise RunError(f"Expected a directory as output, {output} is a file.")
    make_directory(output)
    with (output / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"Another process is running in {output}.") from None
        try:
            yield
        finally:
            if [entry.name for entry in output.iterdir()] == [_LOCK]:
                (output / _LOCK).unlink()
                if not existed:
                    output.rmdir()


def resolve(
    config: RunConfig, output: Path, *, resume: bool, run: str | None = None
) -> RunConfig:
    """Gives the run its id, or finds it again; the server writes it down.

    Args:
        config: as read.
        output: the run directory.
        resume: go on with the run that it holds.
        run: the id of a new run; drawn by default.

    Raises:
        RunError: if the directory holds another run, or none to resume.
    """
    state = config.run.state
    changes = {
        "id": run or uuid.uuid4().hex[:16],
        "state": str(Path(state).expanduser().absolute()) if state else None,
    }
    path = output / "config.toml"
    if resume:
        if not path.exists():
            raise RunError(f"Expected a run to resume in {output}, found none.")
        stored = RunConfig.from_file(path)
        if (stored.hash, stored.run.state) != (config.hash, changes["state"]):
            raise RunError(
                f"Expected the configuration that {output} was started with, got a "
                "changed one; start it in another output directory."
            )
        changes["id"] = stored.run.id
    elif any(entry.name != _LOCK for entry in output.iterdir()):
        raise RunError(
            f"Expected a new output directory, {output} holds something already: "
            "choose another, or go on with --resume."
        )
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})
