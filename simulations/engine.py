"""Runs a scenario in this process and writes its run directory."""

import json
import uuid
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict

from client.site import partition_digest
from fedpeft.config import RunConfig
from fedpeft.data import load, partition, split
from fedpeft.errors import RunError
from fedpeft.privacy import data_sources, verify
from server.app import app, write_json
from simulations.flower import RUN_ID, SERVER_NODE_ID, set_identity
from simulations.grid import InProcessGrid
from simulations.workers import RunConfigDict, WorkerPool


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
    config = _resolve(config, output, resume=resume)
    state = Path(config.run.state) if config.run.state else output
    _check_state(config, state)
    partition(split(load(config.data), config.data).train, config.partition)
    torch.set_num_threads(1)
    set_identity()
    shared: RunConfigDict = {"config": config.to_toml(), "state": str(state.absolute())}
    pool = WorkerPool(config.run.workers, shared)
    try:
        grid = InProcessGrid(pool, config.partition.num_clients)
        run_config = {**shared, "output": str(output), "resume": resume}
        context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), run_config)
        app(grid, context)
    finally:
        pool.close()
    return _with_ledgers(config, state, output)


def _resolve(config: RunConfig, output: Path, *, resume: bool) -> RunConfig:
    """Gives the run its id, or finds it again; the server writes it down.

    Raises:
        RunError: if the directory holds another run, or none to resume.
    """
    path = output / "config.toml"
    if resume:
        if not path.exists():
            raise RunError(f"Expected a run to resume in {output}, found none.")
        stored = RunConfig.from_file(path)
        if stored.hash != config.hash:
            raise RunError(
                f"Expected the configuration that {output} was started with, got a "
                "changed one; start it in another output directory."
            )
        run = config.run.model_copy(update={"id": stored.run.id})
        return config.model_copy(update={"run": run})
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(
            f"Expected a new output directory, {output} holds something already: "
            "choose another, or go on with --resume."
        )
    run = config.run.model_copy(update={"id": uuid.uuid4().hex[:16]})
    config = config.model_copy(update={"run": run})
    return config


def _check_state(config: RunConfig, state: Path) -> None:
    """Refuses a state directory whose ledgers count other partitions of the data."""
    digest = partition_digest(config)
    foreign = [name for name in data_sources(state) if not name.endswith(digest)]
    if foreign:
        raise RunError(
            f"The state directory {state} belongs to another data set or partition "
            f"(ledger {foreign[0]}): under this one the same records would be counted "
            "in two ledgers. Give this run its own [run] state."
        )


def _with_ledgers(config: RunConfig, state: Path, output: Path) -> dict[str, Any]:
    """Adds to the result what the ledgers know: earlier runs count too."""
    path = output / "result.json"
    result: dict[str, Any] = json.loads(path.read_bytes())
    if config.is_private:
        delta = config.privacy.target_delta
        spent = [verify(state, source).spent(delta) for source in data_sources(state)]
        result["privacy"]["spent_epsilon"] = max(spent)
        write_json(path, result)
    return result
