"""Runs a scenario in this process and writes its run directory."""

from pathlib import Path
from typing import Any

import torch

from client.flower import set_identity
from client.holding import partition_digest
from fedpeft.config import RunConfig
from fedpeft.data import check_classes, load, partition, split
from fedpeft.durable import make_directory
from fedpeft.errors import RunError
from fedpeft.menus import check_variants
from fedpeft.privacy import data_sources, make_plan, read_memory, verify
from fedpeft.tensors import Tensors
from server.app import serve
from server.checkpoint import Progress
from server.rundir import claimed, resolve
from server.runtime import Runtime
from simulations.grid import InProcessGrid
from simulations.workers import WorkerPool


def simulate(
    config: RunConfig,
    output: Path,
    *,
    resume: bool = False,
    most_rounds: int | None = None,
    auditor: str | None = None,
) -> dict[str, Any]:
    """Runs all clients and the server; returns the content of ``result.json``.

    Args:
        config: as read; with `resume`, equal to the one the run was started with.
        output: the run directory. A new run needs it to be new or empty.
        resume: go on from the last complete round.
        most_rounds: stop after so many, whatever the configuration plans; None runs
            them all.
        auditor: public key for which everything is kept, for data that are public.

    Raises:
        RunStopped: if `most_rounds` ended it; they are on disk.
        FedpeftError: one line that says what stopped the run.
    """
    check_variants(config)
    make_plan(config)
    with claimed(output):
        config = resolve(config, output, resume=resume)
        state = Path(config.run.state) if config.run.state else output.absolute()
        _check_state(config, state)
        torch.set_num_threads(1)
        set_identity()
        shared = {"config": config.to_toml(), "state": str(state)}
        progress: list[Progress] = []
        pool = WorkerPool(config.run.workers, shared)
        try:
            grid = InProcessGrid(pool, config.partition.num_clients)
            return serve(
                grid,
                config,
                output,
                resume=resume,
                runtime=Runtime(
                    spent=lambda: _worst_client(config, state),
                    workers_memory=pool.peak_memory_bytes,
                    local_parts=lambda: _local_parts(config, state),
                    watch=progress.append,
                    auditor=auditor,
                    should_stop=lambda: _is_enough(progress, most_rounds),
                ),
            )
        finally:
            pool.close()


def _is_enough(progress: list[Progress], most_rounds: int | None) -> bool:
    done = progress[-1].server_round if progress else 0
    return most_rounds is not None and done >= most_rounds


def _check_state(config: RunConfig, state: Path) -> None:
    """Refuses a state directory whose ledgers count other deals of the data.

    Raises:
        RunError: under another deal the same records would be counted in two ledgers.
        LedgerError: if a ledger is not whole.
    """
    if config.run.state:
        make_directory(state)
    train = split(load(config.data), config.data).train
    check_classes(train)
    digest = partition_digest(train, partition(train, config.partition))
    for name in data_sources(state):
        if not name.endswith(digest):
            raise RunError(
                f"The state directory {state} belongs to another data set or partition "
                f"(ledger {name}): under this one the same records would be counted in "
                "two ledgers. A state directory of its own would not count what these "
                "ledgers hold."
            )


def _local_parts(config: RunConfig, state: Path) -> list[Tensors]:
    """Returns what each client has kept to itself in this run, from its own files."""
    run = config.run.id or ""
    sources = data_sources(state)
    known = [read_memory(state, source, run).local for source in sources]
    return known + [{}] * (config.partition.num_clients - len(known))


def _worst_client(config: RunConfig, state: Path) -> float:
    """Returns the largest epsilon of all ledgers, earlier runs included."""
    delta = config.privacy.target_delta
    ledgers = (verify(state, source) for source in data_sources(state))
    return max((ledger.spent(delta) for ledger in ledgers), default=0.0)
