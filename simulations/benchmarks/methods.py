"""Which method? Accuracy, trained values, bytes a round and step time of each.

Method by task by privacy, all else equal: 20 clients with a Dirichlet(0.1) label skew,
one pass of all clients over their examples a round, dense updates. The best of the
learning rates listed is taken by validation accuracy. The accuracy is on test data that
nothing was chosen by. Resumable: what the result file holds is not run again. Names in
the file what was left out.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.data import load, split
from fedpeft.durable import write_atomically
from fedpeft.evaluation import evaluate
from fedpeft.model import TaskModel, build_model, load_trainable_state
from fedpeft.privacy import DpSgd, NonPrivate
from fedpeft.training import example_losses
from simulations.benchmarks.measuring import cpu_seconds, interleaved_medians
from simulations.engine import simulate

METHODS: dict[str, str] = {
    "head": "{name = 'head'}",
    "bias": "{name = 'bias'}",
    "lora, frozen A": "{name = 'lora', rank = 8, freeze_a = true}",
    "full": "{name = 'full'}",
    "ssf": "{name = 'ssf'}",
    "lora": "{name = 'lora', rank = 8}",
    "film": "{name = 'film'}",
    "bottleneck": "{name = 'bottleneck', width = 8}",
}
TASKS = {
    "images": {
        "task": "image-classification",
        "backbone": "vit-s",
        "data": "fashion-mnist",
        "max_examples": 2500,
        "rounds": 6,
        "first_layer": 0,
    },
    "text": {
        "task": "text-classification",
        "backbone": "minilm",
        "data": "rotten-tomatoes",
        "max_examples": 3000,
        "rounds": 20,
        "first_layer": 4,  # of 6: what lies below is computed once
    },
}
RATES: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    # Adam's steps are as long whatever the gradient; full fine-tuning wants small ones.
    ("images", "none"): {"full": (1e-4, 5e-4, 2e-5), "others": (2e-3, 1e-2)},
    # Of 1, 0.2 and 0.05 with LoRA, the best on validation data.
    ("text", "none"): {"full": (0.05,), "others": (0.05,)},
    # A step of clipped gradients is at most as long as the rate. One rate: a private
    # run pays for every further one.
    ("images", "epsilon 8"): {"full": (0.2,), "others": (1.0,)},
    ("text", "epsilon 8"): {"full": (1.0,), "others": (1.0,)},
}
PRIVACIES = ("none", "epsilon 8")
MISSING = [
    "causal-lm: 135 million parameters take a GPU at this number of runs",
    "seeds 1 and 2: --seeds 3, where a GPU is at hand",
    "full: the embeddings stay frozen, with privacy and without",
]
RESULT = Path(__file__).parents[1] / "results" / "methods.json"

SCENARIO = """
[run]
rounds = {rounds}
evaluate_every = {rounds}
evaluate_on = "validation"
[data]
name = "{data}"
max_examples = {max_examples}
test_fraction = 0.2
validation_fraction = 0.1
image_size = 42
max_length = 48
[partition]
name = "dirichlet"
dirichlet_alpha = 0.1
num_clients = 20
[model]
backbone = "{backbone}"
task = "{task}"
[peft]
name = "head"
[training]
optimizer = "adamw"
learning_rate = 1e-3
decay = "linear"
batch_size = 20
max_physical_batch = 16
precision = "bf16"
[cohort]
size = 20
[privacy]
unit = "none"
target_epsilon = 8.0
target_delta = 1e-5
"""
FULL_BATCHES = (
    "training.optimizer='sgd'",
    "training.batch_size='nominal'",
    "aggregation={name='mean', server_optimizer={name='momentum', momentum=0.8}}",
)
PRIVATE = ("privacy.unit='example'", *FULL_BATCHES)
RECIPES = {
    ("images", "none"): (),
    # Of two classes many clients hold one alone: several local steps make them drift
    # apart, and every method then answers with one class.
    ("text", "none"): FULL_BATCHES,
    ("images", "epsilon 8"): PRIVATE,
    ("text", "epsilon 8"): PRIVATE,
}


@dataclass(frozen=True)
class Cell:
    """One entry of the table."""

    task: str
    method: str
    privacy: str
    seed: int

    @property
    def key(self) -> str:
        """Names it in the result file."""
        return f"{self.task} | {self.method} | {self.privacy} | seed {self.seed}"

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from."""
        grid = RATES[self.task, self.privacy]
        return grid.get(self.method, grid["others"])

    def config(self, rate: float) -> RunConfig:
        """Returns the run's configuration."""
        toml = SCENARIO.format(**TASKS[self.task])
        overrides = [
            f"run.seed={self.seed}",
            f"training.learning_rate={rate}",
            f"peft={METHODS[self.method]}",
            *self._place(),
            *RECIPES[self.task, self.privacy],
        ]
        return RunConfig.from_toml(toml, overrides)

    def _place(self) -> tuple[str, ...]:
        first_layer = TASKS[self.task]["first_layer"]
        is_above = self.method == "head" or not first_layer
        return () if is_above else (f"peft.first_layer={first_layer}",)


def measure(cell: Cell, rate: float) -> dict[str, Any]:
    """Runs one learning rate, and judges its model on test data."""
    return {"learning_rate": rate, **_run(cell.config(rate))}


def _run(config: RunConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(config, Path(folder) / "run")
        state = load_file(Path(folder) / "run" / "model" / "adapter.safetensors")
    test = split(load(config.data), config.data).test
    model = build_model(config, len(test.label_names))
    trainable = {n for n, p in model.module.named_parameters() if p.requires_grad}
    load_trainable_state(model, {n: state[n] for n in trainable})
    torch.set_num_threads(os.cpu_count() or 1)
    metrics = evaluate(model, model.task.encode(test), config.training.precision)
    last = result["rounds"][-1]
    return {
        "accuracy": round(metrics["accuracy"], 4),
        "macro_f1": round(metrics["macro_f1"], 4),
        "validation": result["final"]["value"],
        "trainable_parameters": result["trainable_parameters"],
        "bytes_a_round_a_client": last["bytes_up"] // last["replies"],
        "spent_epsilon": result["privacy"].get("spent_epsilon"),
        "seconds": result["seconds"],
    }


def step_milliseconds(task: str, is_private: bool) -> dict[str, float]:
    """Returns each method's time of a step of 16 examples, on one thread."""
    torch.set_num_threads(1)
    privacy = "epsilon 8" if is_private else "none"
    steps = {}
    for method in METHODS:
        config = Cell(task, method, privacy, 0).config(1.0)
        model = build_model(config, 10)
        engine = DpSgd(1.0, 1.0, 16) if is_private else NonPrivate()
        engine.bind(model.module, model.operations)
        steps[method] = _step(model, engine, config)
    times = interleaved_medians(steps, 5, cpu_seconds)
    return {method: round(1000 * seconds, 1) for method, seconds in times.items()}


def _step(model: TaskModel, engine: Any, config: RunConfig) -> Any:
    data = config.data.model_copy(update={"max_examples": 16})
    examples = model.task.encode(load(data))

    def step() -> None:
        losses = example_losses(model, examples, [*range(16)], config.training)
        engine.accumulate(losses)
        engine.step(lambda total, deviation: total)

    return step


def main() -> None:
    """Fills the table cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--task", choices=list(TASKS), action="append")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    table = json.loads(RESULT.read_text()) if RESULT.exists() else {"cells": {}}
    tasks = arguments.task or list(TASKS)
    for seed in range(arguments.seeds):
        for task in tasks:
            for method in METHODS:
                for privacy in PRIVACIES:
                    _fill(table, Cell(task, method, privacy, seed))
    for task in tasks:
        for privacy in PRIVACIES:
            key = f"step_milliseconds | {task} | {privacy}"
            if key not in table:
                table[key] = step_milliseconds(task, privacy != "none")
                _save(table)
    print(json.dumps(table, indent=2) if arguments.json else f"written: {RESULT}")


def _fill(table: dict[str, Any], cell: Cell) -> None:
    """Runs the learning rates that are not there yet; keeps the best by validation."""
    best = table["cells"].get(cell.key, {"validation_by_rate": {}})
    by_rate = best["validation_by_rate"]
    for rate in cell.rates:
        if str(rate) in by_rate:
            continue
        found = measure(cell, rate)
        by_rate[str(rate)] = found["validation"]
        if found["validation"] == max(by_rate.values()):
            best = found
        best = {**best, "validation_by_rate": by_rate}
        table["cells"][cell.key] = best
        print(f"{cell.key}, rate {rate}: {found['accuracy']}", flush=True)
        _save(table)


def _save(table: dict[str, Any]) -> None:
    """Writes what there is, and what there is not."""
    cells = {(t, m, p, 0) for t in TASKS for m in METHODS for p in PRIVACIES}
    left = [Cell(*cell).key for cell in cells if Cell(*cell).key not in table["cells"]]
    gpu = "CUDA" if torch.cuda.is_available() else "no GPU"
    table["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, {gpu}"
    table["scenario"], table["tasks"] = SCENARIO, TASKS
    table["missing"] = [*MISSING, *sorted(left)]
    write_atomically(RESULT, (json.dumps(table, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
