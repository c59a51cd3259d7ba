"""The Flower ServerApp: the same in every runtime."""

import json
import time
from collections.abc import Callable
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
from fedpeft.privacy import (
    AdaptiveNorm,
    Banded,
    Plan,
    PrivateMean,
    Randomness,
    SecureRandomness,
    SeededRandomness,
    make_plan,
)
from fedpeft.seeds import derive_seed
from fedpeft.tensors import zeros_like
from server.checkpoint import (
    Progress,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from server.result import build_result, peak_memory_bytes
from server.rounds import Server, final_state, restore_events, run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs all rounds and writes the run directory.

    The context's ``run_config`` holds ``config`` (resolved, as TOML), ``output`` (the
    run directory) and ``resume``.
    """
    config = RunConfig.from_toml(str(context.run_config["config"]))
    output = Path(str(context.run_config["output"]))
    serve(grid, config, output, resume=bool(context.run_config["resume"]))


def serve(
    grid: Grid,
    config: RunConfig,
    output: Path,
    *,
    resume: bool,
    spent: Callable[[], float] | None = None,
    workers_memory: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """Runs all rounds, writes the run directory, returns ``result.json``'s content.

    Args:
        grid: reaches the clients.
        config: resolved, with a run id.
        output: the run directory.
        resume: go on from the last complete round.
        spent: the worst client's epsilon over all runs, where the ledgers can be read;
            without it the result states the plan's price of the rounds asked for.
        workers_memory: peak bytes of client processes on this machine.

    Raises:
        FedpeftError: one line that says what stopped the run.
    """
    started = time.perf_counter()
    server = open_server(config, output)
    progress = _start(server, resume=resume)
    earlier = sum(record["seconds"] or 0.0 for record in progress.records)
    run_rounds(grid, server, progress)
    _write_model(server, progress)
    result = build_result(
        server,
        progress,
        seconds=earlier + time.perf_counter() - started,
        spent=spent,
        memory=peak_memory_bytes() + workers_memory(),
    )
    write_atomically(
        output / "result.json", json.dumps(result, indent=2).encode() + b"\n"
    )
    return result


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
    plan = make_plan(config)
    return Server(
        run=config.run.id,
        config=config,
        plan=plan,
        model=model,
        aggregator=build_aggregator(config.aggregation, _private_rule(config, plan)),
        compressor=build(COMPRESSORS, config.compression, "compression"),
        held_out=encode(judged_on, model.tokenizer, config.data.max_length),
        output=output,
        randomness=_randomness(config, "cohort"),
    )


def _private_rule(config: RunConfig, plan: Plan | None) -> PrivateMean | None:
    """Returns the mean that clips and noises, where the server owes privacy."""
    if plan is None or plan.is_dp_sgd:
        return None
    norm, adaptive = None, config.privacy.adaptive_clipping
    if adaptive is not None and plan.count_noise is not None:
        norm = AdaptiveNorm(adaptive.quantile, adaptive.learning_rate, plan.count_noise)
    return PrivateMean(
        plan.clipping_norm,
        plan.noise_multiplier,
        plan.nominal_batch,
        _randomness(config, "noise"),
        adaptive=norm,
        banded=Banded(config.run.rounds, plan.bands) if plan.bands else None,
    )


def _randomness(config: RunConfig, purpose: str) -> Callable[[int], Randomness]:
    """Returns where the server's draws of a round come from."""

    def of_round(server_round: int) -> Randomness:
        if config.privacy.noise == "secure":
            return SecureRandomness()
        key = (purpose, config.hash, server_round)
        return SeededRandomness(derive_seed(config.run.seed, "server", *key))

    return of_round


def _start(server: Server, *, resume: bool) -> Progress:
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
    state = trainable_state(server.model)
    progress = Progress(0, state, server.aggregator.init(state), zeros_like(state))
    if server.hides_clients:
        _check_nothing_is_forgotten(server.output, progress)
    write_atomically(server.output / "config.toml", server.config.to_toml().encode())
    save_checkpoint(folder, progress, server.config.hash)
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
