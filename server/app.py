"""The Flower ServerApp: the same in every runtime."""

import json
import time
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save

from fedpeft.aggregation import build_aggregator
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig, build
from fedpeft.data import encode, load, split
from fedpeft.durable import write_atomically
from fedpeft.errors import RunError
from fedpeft.model import build_model, trainable_state
from fedpeft.privacy import make_plan
from fedpeft.tensors import zeros_like
from server.checkpoint import Progress, load_checkpoint, save_checkpoint
from server.result import build_result
from server.rounds import Server, final_state, restore_events, run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs all rounds and writes the run directory.

    The context's ``run_config`` holds ``config`` (resolved, as TOML), ``output`` (the
    run directory) and ``resume``.
    """
    started = time.perf_counter()
    config = RunConfig.from_toml(str(context.run_config["config"]))
    output = Path(str(context.run_config["output"]))
    server = open_server(config, output)
    progress = _start(server, resume=bool(context.run_config["resume"]))
    earlier = sum(record["seconds"] for record in progress.records)
    run_rounds(grid, server, progress)
    _write_model(server, progress)
    seconds = earlier + time.perf_counter() - started
    result = build_result(server, progress, seconds)
    write_json(output / "result.json", result)


def open_server(config: RunConfig, output: Path) -> Server:
    """Builds everything that the loop needs.

    Raises:
        RunError: if the configuration has no run id.
    """
    if config.run.id is None:
        raise RunError("Expected a resolved configuration with [run] id.")
    splits = split(load(config.data), config.data)
    model = build_model(config, len(splits.test.label_names))
    judged_on = splits.test if config.run.evaluate_on == "test" else splits.validation
    return Server(
        run=config.run.id,
        config=config,
        plan=make_plan(config),
        model=model,
        aggregator=build_aggregator(config.aggregation),
        compressor=build(COMPRESSORS, config.compression, "compression"),
        held_out=encode(judged_on, model.tokenizer, config.data.max_length),
        output=output,
    )


def _start(server: Server, *, resume: bool) -> Progress:
    """Returns where to go on from: a checkpoint, or round 0, which becomes one."""
    folder = server.output / "checkpoint"
    # Without a checkpoint nothing was asked of any client yet: the start is safe.
    if resume and folder.exists():
        progress = load_checkpoint(folder, server.config.hash)
        restore_events(server.output, progress)
        return progress
    state = trainable_state(server.model)
    progress = Progress(0, state, server.aggregator.init(state), zeros_like(state))
    write_atomically(server.output / "config.toml", server.config.to_toml().encode())
    save_checkpoint(folder, progress, server.config.hash)
    return progress


def _write_model(server: Server, progress: Progress) -> None:
    """Writes adapter and head, with what they belong to."""
    constants = server.model.adapter_constants
    adapter = {**constants, **final_state(progress, server.config)}
    metadata = {
        "backbone": server.config.model.backbone,
        "fingerprint": server.model.fingerprint,
        "config_hash": server.config.hash,
    }
    path = server.output / "model" / "adapter.safetensors"
    write_atomically(path, save(adapter, metadata=metadata))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that a person can read, atomically."""
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
