"""Runs a scenario in this process and writes its run directory."""

import contextlib
import fcntl
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from client.flower import set_identity
from client.site import partition_digest
from fedpeft.config import RunConfig
from fedpeft.data import load, partition, split
from fedpeft.durable import make_directory
from fedpeft.errors import RunError
from fedpeft.menus import check_variants
from fedpeft.privacy import data_sources, make_plan, verify
from server.app import serve
from simulations.grid import InProcessGrid
from simulations.workers import WorkerPool

_LOCK = "run.lock"


def simulate(
    config: RunConfig, output: Path, *, resume: bool = False
) -> dict[str, Any]:
    """Runs all clients and the server; returns the content of ``result.json``.

    Args:
        config: as read; with `resume`, equal to the one the run was started with.
        output: the run directory. A new run needs it to be new or empty.
        resume: go on from the last complete round.

    Raises:
        FedpeftError: one line that says what stopped the run.
    """
    check_variants(config)
    make_plan(config)
    with _claimed(output):
        config = _resolve(config, output, resume=resume)
        state = Path(config.run.state) if config.run.state else output.absolute()
        _check_state(config, state)
        torch.set_num_threads(1)
        set_identity()
        shared = {"config": config.to_toml(), "state": str(state)}
        pool = WorkerPool(config.run.workers, shared)
        try:
            grid = InProcessGrid(pool, config.partition.num_clients)
            return serve(
                grid,
                config,
                output,
                resume=resume,
                spent=lambda: _worst_client(config, state),
                workers_memory=pool.peak_memory_bytes,
            )
        finally:
            pool.close()


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[None]:
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


def _resolve(config: RunConfig, output: Path, *, resume: bool) -> RunConfig:
    """Gives the run its id, or finds it again; the server writes it down.

    Raises:
        RunError: if the directory holds another run, or none to resume.
    """
    state = config.run.state
    changes = {
        "id": uuid.uuid4().hex[:16],
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


def _check_state(config: RunConfig, state: Path) -> None:
    """Refuses a state directory whose ledgers count other deals of the data.

    Raises:
        RunError: under another deal the same records would be counted in two ledgers.
        LedgerError: if a ledger is not whole.
    """
    if config.run.state:
        make_directory(state)
    train = split(load(config.data), config.data).train
    digest = partition_digest(train, partition(train, config.partition))
    for name in data_sources(state):
        if not name.endswith(digest):
            raise RunError(
                f"The state directory {state} belongs to another data set or partition "
                f"(ledger {name}): under this one the same records would be counted in "
                "two ledgers. A state directory of its own would not count what these "
                "ledgers hold."
            )


def _worst_client(config: RunConfig, state: Path) -> float:
    """Returns the largest epsilon of all ledgers, earlier runs included."""
    delta = config.privacy.target_delta
    ledgers = (verify(state, source) for source in data_sources(state))
    return max((ledger.spent(delta) for ledger in ledgers), default=0.0)
