"""The Flower ServerApp: the same in every runtime."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save

from client.context import configuration, run_directory, run_id
from fedpeft.config import RunConfig
from fedpeft.durable import write_atomically
from fedpeft.errors import RunError, RunStopped
from fedpeft.menus import check_variants
from fedpeft.model import shared_state
from fedpeft.tensors import zeros_like
from server.checkpoint import (
    Progress,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from server.nodes import find_nodes
from server.result import build_result, peak_memory_bytes
from server.rounds import final_state, restore_events, run_rounds
from server.rundir import claimed, resolve
from server.runtime import SIMULATION, Runtime
from server.samples import write_samples
from server.setup import Server, open_server

app = ServerApp()
logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs all rounds and writes the run directory, under an engine of Flower's own.

    The context's ``run_config`` holds the configuration as :mod:`client.context` reads
    it, ``output`` (the run directory; empty names it by the run), ``resume`` (go on in
    that directory) and ``deadline-seconds`` (for the clients to come, and for a round).
    """
    settings = context.run_config
    config = RunConfig.from_toml(configuration(context))
    check_variants(config)
    output = run_directory(context).absolute()
    resume = bool(settings["resume"])
    deadline = float(settings["deadline-seconds"])
    with claimed(output):
        config = resolve(config, output, resume=resume, run=run_id(context))
        print(f"Run directory: {output}", flush=True)
        nodes = find_nodes(grid, config.partition.num_clients, deadline)
        runtime = Runtime(deadline_seconds=deadline, nodes=nodes, watch=_say)
        serve(grid, config, output, resume=resume, runtime=runtime)


def _say(progress: Progress) -> None:
    """Prints how far a run is, for Flower's log."""
    if progress.records:
        record = progress.records[-1]
        metric = "-" if record["metric"] is None else record["metric"]
        print(f"round={record['round']} metric={metric}", flush=True)


def serve(
    grid: Grid,
    config: RunConfig,
    output: Path,
    *,
    resume: bool,
    runtime: Runtime = SIMULATION,
) -> dict[str, Any]:
    """Runs all rounds, writes the run directory, returns ``result.json``'s content.

    Args:
        grid: reaches the clients.
        config: resolved, with a run id.
        output: the run directory.
        resume: go on from the last complete round.
        runtime: what is known of where this runs.

    Raises:
        RunStopped: if the runtime asked for it; the last complete round is on disk.
        FedpeftError: one line that says what stopped the run.
    """
    server = open_server(config, output, runtime)
    return run_to_the_end(grid, server, begin(server, resume=resume))


def run_to_the_end(grid: Grid, server: Server, progress: Progress) -> dict[str, Any]:
    """Does what :func:`serve` says, with a server that has begun."""
    started = time.perf_counter()
    earlier = sum(record["seconds"] or 0.0 for record in progress.records)
    try:
        run_rounds(grid, server, progress)
    except RunError as error:
        if not server.runtime.should_stop():
            raise
        logger.info("stopped in the middle of a round: %s", error)
    rounds = server.config.run.rounds
    if progress.server_round < rounds:
        raise RunStopped(
            f"Stopped after round {progress.server_round} of {rounds}, as asked; the "
            "run goes on when it is started again."
        )
    _write_model(server, progress)
    write_samples(server, "after", final_state(progress, server.config))
    result = build_result(
        server,
        progress,
        seconds=earlier + time.perf_counter() - started,
        spent=server.runtime.spent,
        memory=peak_memory_bytes() + server.runtime.workers_memory(),
    )
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(server.output / "result.json", text.encode())
    return result


def begin(server: Server, *, resume: bool) -> Progress:
    """Returns where to go on from: a checkpoint, or round 0, which becomes one."""
    folder = server.output / "checkpoint"
    # Without a checkpoint nothing was asked of any client yet: the start is safe.
    if resume and has_checkpoint(folder):
        progress = load_checkpoint(
            folder, server.config.hash, may_fall_back=not server.hides_clients
        )
        if server.hides_clients:
            _check_nothing_is_forgotten(server.output, progress)
        restore_events(server.output, progress)
        return progress
    state = shared_state(server.model)
    progress = Progress(0, state, server.aggregator.init(state), zeros_like(state))
    if server.hides_clients:
        _check_nothing_is_forgotten(server.output, progress)
    write_atomically(server.output / "config.toml", server.config.to_toml().encode())
    save_checkpoint(folder, progress, server.config.hash)
    restore_events(server.output, progress)  # if all checkpoints were lost
    write_samples(server, "before", progress.trainable)
    return progress


def _check_nothing_is_forgotten(output: Path, progress: Progress) -> None:
    """Refuses to go on from before a round that was released.

    Raises:
        RunError: the same answers would be released again, with other noise.
    """
    path = output / "events.jsonl"
    released = len(path.read_text().splitlines()) if path.exists() else 0
    if released > progress.server_round:
        raise RunError(
            f"Expected a checkpoint of round {released} in {output}, found one of "
            f"round {progress.server_round}: the rounds between would be released a "
            "second time. Start a new run."
        )


def _write_model(server: Server, progress: Progress) -> None:
    """Writes adapter and head, with what they belong to.

    What stays at the clients is not in it: its initial values stand beside it.
    """
    constants = server.model.adapter_constants
    adapter = {**constants, **final_state(progress, server.config)}
    metadata = {
        "backbone": server.config.model.backbone,
        "fingerprint": server.model.fingerprint,
        "config_hash": server.config.hash,
    }
    folder, local = server.output / "model", server.model.local_start
    write_atomically(folder / "adapter.safetensors", save(adapter, metadata=metadata))
    if local:
        write_atomically(folder / "local.safetensors", save(local, metadata=metadata))
