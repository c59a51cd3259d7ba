"""What the cache of frozen features and the side network save: time and memory.

Real weights: MiniLM on texts of 64 tokens, or the ViT-S/14 at 224 pixels, 32 examples a
step, plain training. Time: an epoch of the head alone, and of the side network, without
the cache, in the first epoch with it, and in those after. The losses with and without
must be equal. Memory: what two steps of side-tuning add to a process at their peak,
with the cache and without, relative to LoRA of rank 8 on query and value.

One process of one thread, in CPU seconds; each peak in a fork of its own.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fedpeft.backbone import load_backbone
from fedpeft.data import Encoded
from fedpeft.features import FeatureFile, KeptFeatures, keep_features
from fedpeft.interfaces import PeftMethod
from fedpeft.model import TaskModel
from fedpeft.peft import METHODS
from fedpeft.sections import DataSection, TrainingSection
from fedpeft.tasks import TASKS
from fedpeft.training import example_losses
from simulations.benchmarks.dp_step import machine
from simulations.benchmarks.measuring import cpu_seconds, forked_peak, keep_freed_memory

BATCH = 32
TOKENS = 64
SIZE = 224
LABELS = 4
_TOLERANCE = 1e-5
_SECTION = TrainingSection(learning_rate=0.01, batch_size=BATCH)
_TASKS = {"minilm": "text-classification", "vit-s": "image-classification"}


@dataclass(frozen=True)
class Bench:
    """A model and examples for it."""

    model: TaskModel
    examples: Encoded

    def epoch(self, kept: KeptFeatures | None) -> torch.Tensor:
        """Runs forward and backward over all examples; returns their losses."""
        losses = []
        size = len(self.examples.labels)
        for start in range(0, size, BATCH):
            indices = list(range(start, min(size, start + BATCH)))
            found = example_losses(self.model, self.examples, indices, _SECTION, kept)
            found.sum().backward()  # type: ignore[no-untyped-call]
            losses.append(found.detach())
        return torch.cat(losses)

    def kept(self) -> KeptFeatures:
        """Returns an empty cache."""
        kept = keep_features(self.model, self.examples, "fp32", FeatureFile(1 << 30))
        assert kept is not None
        return kept


def make_bench(name: str, method: PeftMethod, num_examples: int) -> Bench:
    """Loads a backbone, attaches a method and draws examples.

    What trains has left the identity, where some gradients are zero.
    """
    backbone = load_backbone(name, _TASKS[name])
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        operations = method.attach(backbone.module)
        section = DataSection(name="mnist", image_size=SIZE, nominal_examples=1)
        task = TASKS[_TASKS[name]].of(backbone, section)
        module = task.build(backbone, LABELS).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    shape, high = ((TOKENS,), 30000) if name == "minilm" else ((SIZE, SIZE, 3), 256)
    inputs = [
        torch.randint(high, shape, generator=rng).to(
            torch.int64 if name == "minilm" else torch.uint8
        )
        for _ in range(num_examples)
    ]
    labels = torch.randint(LABELS, (num_examples,), generator=rng)
    operations = [*operations, *module.head_operations]
    return Bench(TaskModel(module, operations, task, "", {}), Encoded(inputs, labels))


def times(bench: Bench, rounds: int) -> dict[str, float]:
    """Returns seconds an epoch without the cache, in its first epoch and after.

    Raises:
        ValueError: if the losses are others.
    """
    without = statistics.median(_seconds(bench, None) for _ in range(rounds))
    kept = bench.kept()
    first = _seconds(bench, kept)
    after = statistics.median(_seconds(bench, kept) for _ in range(3 * rounds))
    difference = float((bench.epoch(kept) - bench.epoch(None)).abs().max())
    if difference > _TOLERANCE:
        raise ValueError(f"Expected equal losses, they differ by {difference:.1e}.")
    return {
        "without": round(without, 4),
        "first": round(first, 4),
        "after": round(after, 4),
        "speed_up": round(without / after, 1),
        "largest_difference_of_losses": difference,
    }


def _seconds(bench: Bench, kept: KeptFeatures | None) -> float:
    return cpu_seconds(lambda: _run(bench, kept))


def _run(bench: Bench, kept: KeptFeatures | None) -> None:
    bench.epoch(kept)


def peaks(name: str) -> dict[str, float]:
    """Returns MiB at the peak of two steps, and shares of LoRA's."""
    found: dict[str, int] = {}
    for method, is_kept in (("lora", False), ("side", False), ("side", True)):
        bench = make_bench(name, METHODS[method](), BATCH)
        kept = bench.kept() if is_kept else None
        if kept:
            bench.epoch(kept)  # the first pass fills the file
        small = make_bench(name, METHODS[method](), 1)
        work: Callable[[], None] = partial(_two_steps, bench, kept)
        label = f"{method}_kept" if is_kept else method
        found[label] = forked_peak(work, partial(_two_steps, small, None))
    return {
        **{f"{label}_mib": round(peak / 2**20, 1) for label, peak in found.items()},
        "side_share": round(found["side"] / found["lora"], 3),
        "side_kept_share": round(found["side_kept"] / found["lora"], 3),
    }


def _two_steps(bench: Bench, kept: KeptFeatures | None) -> None:
    for _ in range(2):
        bench.epoch(kept)


def measure(names: list[str], num_examples: int, rounds: int) -> dict[str, object]:
    """Measures each backbone."""
    results: dict[str, object] = {"machine": machine("cpu", "fp32")}
    for name in names:
        memory = peaks(name)
        print(f"{name} {memory}", file=sys.stderr, flush=True)
        keep_freed_memory()
        of_backbone: dict[str, object] = {"memory": memory}
        for method in ("head", "side"):
            bench = make_bench(name, METHODS[method](), num_examples)
            of_backbone[method] = times(bench, rounds)
            print(f"{name} {method} {of_backbone[method]}", file=sys.stderr, flush=True)
        results[name] = of_backbone
    return results


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--examples", type=int, default=2 * BATCH)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", choices=_TASKS, default=["minilm"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(given.backbones, given.examples, given.rounds)
    print(json.dumps(result, indent=2) if given.json else result)


if __name__ == "__main__":
    main()
