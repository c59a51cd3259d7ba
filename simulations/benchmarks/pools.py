"""What choosing by example costs: a batch at once against one example after the other.

The step of plain training of a ViT-S/14 at 56 pixels with pools of scales and shifts:
forward and backward over 32 images. The published code runs instance by instance, each
twice: through the frozen backbone for its query, then with what it has chosen. Ours
takes the batch at once, and what the frozen part gives from the cache. Both are also
timed the other way, so that it shows what comes from the batch and what from the cache.
Before anything is timed, all ways must give the same gradient.

Interleaved in one process of one thread, in CPU seconds; on a GPU CUDA events.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from fedpeft.backbone import load_backbone
from fedpeft.oracle import relative_error
from fedpeft.peft import SSFPool
from fedpeft.tasks import Dinov2Classifier, TaskModule
from simulations.benchmarks.dp_step import machine
from simulations.benchmarks.measuring import (
    cpu_seconds,
    cuda_seconds,
    interleaved_medians,
    keep_freed_memory,
)

BATCH = 32
SIZE = 56
LABELS = 9
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Bench:
    """A model, a batch, and what the frozen part gives for it."""

    model: TaskModule
    pixels: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor

    def at_once(self, is_kept: bool) -> None:
        """Trains on the batch."""
        self._backward(slice(None), is_kept)

    def one_by_one(self, is_kept: bool) -> None:
        """Trains on one example after the other."""
        for index in range(len(self.labels)):
            self._backward(slice(index, index + 1), is_kept)

    def gradient(self, work: Callable[[], None]) -> torch.Tensor:
        """Returns all gradients that the work leaves."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.model.zero_grad()
        work()
        return torch.cat([p.grad.flatten() for p in trainable if p.grad is not None])

    def _backward(self, part: slice, is_kept: bool) -> None:
        kept = self.kept[part] if is_kept else None
        logits = self.model(self.pixels[part], kept=kept)
        F.cross_entropy(logits, self.labels[part], reduction="sum").backward()  # type: ignore[no-untyped-call]


def make_bench(model: TaskModule, device: str) -> Bench:
    """Draws a batch; what trains has left the identity."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, SIZE, SIZE, generator=rng)
    labels = torch.randint(LABELS, (BATCH,), generator=rng).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.add_(0.02 * noise.to(parameter.device))
    model.to(device).eval()
    kept = model.keep({"pixel_values": pixels.to(device)})
    assert kept is not None
    return Bench(model, pixels.to(device), labels, kept)


def measure(bench: Bench, rounds: int, device: str) -> dict[str, float]:
    """Returns seconds a step of each way, and ratios to the kept batch at once.

    Raises:
        ValueError: if two ways differ in their gradient.
    """
    ways: dict[str, Callable[[], None]] = {
        "at_once_kept": partial(bench.at_once, True),
        "at_once": partial(bench.at_once, False),
        "one_by_one_kept": partial(bench.one_by_one, True),
        "one_by_one": partial(bench.one_by_one, False),
    }
    expected = bench.gradient(ways["one_by_one"])
    for name, way in ways.items():
        error = relative_error(bench.gradient(way), expected)
        if error > _TOLERANCE:
            raise ValueError(f"Expected equal gradients, {name} is off by {error:.1e}.")
    clock = cuda_seconds if device == "cuda" else cpu_seconds
    seconds = interleaved_medians(ways, rounds, clock)
    ours = seconds["at_once_kept"]
    return {
        **{name: round(value, 5) for name, value in seconds.items()},
        "speed_up": round(seconds["one_by_one"] / ours, 2),
        "speed_up_of_batch": round(seconds["one_by_one_kept"] / ours, 2),
        "speed_up_of_cache": round(seconds["at_once"] / ours, 2),
    }


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--first-layers", type=int, nargs="+", default=[0, 9, 11])
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    result: dict[str, object] = {"machine": machine(given.device, "fp32")}
    for first_layer in given.first_layers:
        torch.manual_seed(0)
        backbone = load_backbone("vit-s", "image-classification").module
        SSFPool(pool_size=8, top_k=2, first_layer=first_layer).attach(backbone)
        model = Dinov2Classifier(backbone, 2 * backbone.config.hidden_size, LABELS)
        bench = make_bench(model, given.device)
        result[f"first_layer_{first_layer}"] = measure(
            bench, given.rounds, given.device
        )
    print(json.dumps(result, indent=2) if given.json else result)


if __name__ == "__main__":
    main()
