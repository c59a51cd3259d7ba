"""What a federated round costs beside its training steps.

The same DP-SGD steps of the same clients, once through the whole in-process engine
(messages, checks, ledger, outbox, compression, aggregation, checkpoint), once in a bare
loop of forward, backward, clip, noise and optimiser. Interleaved in one process of one
thread, in CPU seconds; imports and evaluation apart.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from client.flower import set_identity
from client.site import Site, open_site
from fedpeft.config import RunConfig
from fedpeft.data import physical_batches
from fedpeft.model import load_trainable_state, trainable_state
from fedpeft.scenarios import find_scenario
from fedpeft.tensors import zeros_like
from fedpeft.training import example_losses
from server.checkpoint import Progress
from server.cohort import rotation
from server.rounds import run_rounds
from server.setup import open_server
from simulations.grid import InProcessGrid
from simulations.workers import WorkerPool

COHORT = 4


def measure(repeats: int) -> dict[str, float]:
    """Returns median CPU seconds of a round both ways, and their ratio."""
    torch.set_num_threads(1)
    set_identity()
    scenario = find_scenario("text_reviews")
    overrides = (
        f"cohort.size={COHORT}",
        "run.rounds=20",
        "run.workers=0",
        "run.id=0123456789abcdef",
    )
    config = RunConfig.from_file(scenario, overrides)
    site = open_site(config.to_toml())
    bare, engine = [], []
    for repeat in range(repeats):
        bare.append(_cpu_seconds(lambda: _bare_round(site)))
        with tempfile.TemporaryDirectory() as folder:
            run = _engine_round(config, Path(folder))
            engine.append(_cpu_seconds(run))
        line = f"repeat {repeat + 1}: {bare[-1]:.2f} s bare, {engine[-1]:.2f} s engine"
        print(line, file=sys.stderr)
    return {
        "bare_seconds": statistics.median(bare),
        "engine_seconds": statistics.median(engine),
        "ratio": statistics.median(engine) / statistics.median(bare),
    }


def _cpu_seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _bare_round(site: Site) -> None:
    """The clients' steps and nothing else."""
    plan, section = site.plan, site.config.training
    assert plan is not None
    start = trainable_state(site.model)
    for client in rotation(1, COHORT, site.config.partition.num_clients):
        examples = site.holding(client).examples
        load_trainable_state(site.model, start)
        site.model.module.train(section.dropout)
        parameters = [p for p in site.model.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=section.learning_rate)
        for _ in range(plan.local_steps):
            drawn = torch.rand(len(examples)) < plan.sampling_rate
            batch = drawn.nonzero().tolist()
            for part in physical_batches(examples, batch, section.max_physical_batch):
                chunk = [index for unit in part for index in unit]
                site.engine.accumulate(
                    example_losses(site.model, examples, chunk, section)
                )
            site.engine.step(lambda t, deviation: t + deviation * torch.randn_like(t))
            optimizer.step()


def _engine_round(config: RunConfig, folder: Path) -> Callable[[], None]:
    """Prepares a round through the engine; the returned function runs it."""
    server = open_server(config, folder)
    server = replace(server, held_out=server.held_out.subset([0]))
    state = trainable_state(server.model)
    progress = Progress(19, state, server.aggregator.init(state), zeros_like(state))
    pool = WorkerPool(0, {"config": config.to_toml(), "state": str(folder)})
    grid = InProcessGrid(pool, config.partition.num_clients)

    def run() -> None:
        run_rounds(grid, server, progress)
        pool.close()

    return run


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    result = measure(arguments.repeats)
    print(json.dumps(result, indent=2) if arguments.json else result)


if __name__ == "__main__":
    main()
