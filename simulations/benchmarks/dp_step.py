"""What a private step costs: time and peak memory relative to a step without privacy.

Ours and Opacus' modes ``hooks``, ``ghost`` and ``functorch``, on common shapes and
methods. Time: all ways of one shape and method interleaved in one process of one
thread, in a new order each round; the ratio of median CPU seconds, on a GPU of CUDA
events. Memory: each way in a process of its own; the ratio of what model and two steps
add to it at their peak. Before a way is timed it must give the clipped gradient of the
one-example loop when its noise is zero.

The result is ``{shape: {method: {engine: {"time": ratio, "memory": ratio}}}}``. What a
mode cannot do is null, and a line on stderr says why. ``control`` there is a second
copy of the step without privacy: how far a ratio is from 1 by chance.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.privacy import Randomness, SecureRandomness, noise_ahead
from simulations.benchmarks.measuring import (
    cpu_seconds,
    cuda_peak,
    cuda_seconds,
    forked_peak,
    interleaved_medians,
    keep_freed_memory,
)
from simulations.benchmarks.shapes import (
    PEFT_METHODS,
    SHAPES,
    TINY_IMAGES,
    TINY_TEXTS,
    Case,
    Shape,
    make_case,
)
from simulations.benchmarks.steps import (
    CLIPPING_NORM,
    ENGINES,
    Setting,
    StepFn,
    non_private,
)

Results = dict[str, dict[str, dict[str, dict[str, float] | None]]]

ROUNDS = {"vit_ti": 9, "bert": 9, "bert_small": 41}
_WAYS: dict[str, Callable[[Case, Setting], StepFn]] = {
    "non_private": non_private,
    "control": non_private,
    **ENGINES,
}
_WARM_UP = 2
_CHECKED_BATCH = 2
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Bench:
    """One shape and method, on one device."""

    shape: str
    method: str
    device: str
    precision: str

    def case(self, shape: Shape, batch: int | None = None) -> Case:
        """Builds the model anew."""
        return make_case(shape, PEFT_METHODS[self.method], self.device, batch)

    def peaks(self) -> dict[str, int]:
        """Returns each way's peak in bytes; what fails is told and left out."""
        gauge = forked_peak if self.device == "cpu" else cuda_peak
        tiny = TINY_TEXTS if SHAPES[self.shape].tokens else TINY_IMAGES
        found = {}
        for name in ("non_private", *ENGINES):
            try:
                found[name] = gauge(
                    partial(self._two_steps, name, SHAPES[self.shape]),
                    partial(self._two_steps, name, tiny),
                )
            except Exception as error:
                reason = str(error).splitlines()[0]
                _say(f"{self.shape} {self.method} {name}: {reason}")
        return found

    def check(self, engines: Iterable[str]) -> None:
        """Compares engines' noiseless gradients with the one-example loop's.

        Raises:
            ValueError: if one is another.
        """
        shape, expected = SHAPES[self.shape], None
        for engine in engines:
            case = self.case(shape, _CHECKED_BATCH)
            if expected is None:
                expected = _clipped_mean(case)
            ENGINES[engine](case, Setting(0.0, "fp32", SecureRandomness()))()
            gradient = torch.cat([_gradient(p).flatten() for p in case.parameters])
            error = relative_error(gradient, expected)
            if not error < _TOLERANCE:
                raise ValueError(
                    f"Expected {engine} on {self.shape} {self.method} to equal the "
                    f"one-example loop, it is off by {error:.1e}."
                )

    def seconds(self, names: list[str], rounds: int) -> dict[str, float]:
        """Returns the median time of each way's step."""
        with contextlib.ExitStack() as stack:
            steps = {}
            for name in names:
                case = self.case(SHAPES[self.shape])
                randomness = stack.enter_context(self._randomness(case, rounds))
                setting = Setting(1.0, self.precision, randomness)
                steps[name] = _WAYS[name](case, setting)
                for _ in range(_WARM_UP):
                    steps[name]()
            clock = cpu_seconds if self.device == "cpu" else cuda_seconds
            return interleaved_medians(steps, rounds, clock)

    @contextlib.contextmanager
    def _randomness(self, case: Case, rounds: int) -> Iterator[Randomness]:
        """Gives what a client takes: for a GPU the noise is made ahead."""
        if self.device == "cpu":
            yield SecureRandomness()
            return
        size = sum(parameter.numel() for parameter in case.parameters)
        with noise_ahead(SecureRandomness(), size, _WARM_UP + rounds) as ahead:
            yield ahead

    def _two_steps(self, name: str, shape: Shape) -> None:
        setting = Setting(1.0, self.precision, SecureRandomness())
        step = _WAYS[name](self.case(shape), setting)
        step()
        step()


def measure(benches: list[Bench], rounds: int | None = None) -> Results:
    """Measures every engine; `rounds` replaces the numbers of :data:`ROUNDS`."""
    torch.set_num_threads(1)
    with contextlib.suppress(ModuleNotFoundError):  # once, for all forks
        importlib.import_module("simulations.benchmarks.opacus_steps")
    # All forks come before this process has held a model.
    peaks = {bench: bench.peaks() for bench in benches}
    keep_freed_memory()
    results: Results = {}
    for bench in benches:
        memory = peaks[bench]
        engines = [name for name in ENGINES if name in memory]
        bench.check(engines)
        ways = ["non_private", "control", *engines]
        seconds = bench.seconds(ways, rounds or ROUNDS[bench.shape])
        time = {name: seconds[name] / seconds["non_private"] for name in ways}
        ratios = {
            name: {
                "time": round(time[name], 3),
                "memory": round(memory[name] / memory["non_private"], 3),
            }
            for name in engines
        }
        _say(
            f"{bench.shape} {bench.method}: {1000 * seconds['non_private']:.1f} ms, "
            f"{memory['non_private'] >> 20} MiB; control {time['control']:.3f}, "
            + ", ".join(f"{name} {time[name]:.3f}" for name in engines)
        )
        of_shape = results.setdefault(bench.shape, {})
        of_shape[bench.method] = {name: ratios.get(name) for name in ENGINES}
    return results


def machine(device: str, precision: str) -> dict[str, str | int]:
    """Describes where and with what it was measured."""
    is_cpu = device == "cpu"
    found: dict[str, str | int] = {
        "processor": _processor() if is_cpu else torch.cuda.get_device_name(),
        "cores": os.cpu_count() or 1,
        "precision": precision,
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "peft", "opacus"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line for line in lines if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _clipped_mean(case: Case) -> torch.Tensor:
    """Returns the step's gradient without noise, one example at a time."""
    logits = case.model(case.inputs)
    losses = F.cross_entropy(logits, case.labels, reduction="none")
    rows = loop_gradients(losses, case.parameters)
    factors = (CLIPPING_NORM / rows.norm(dim=1)).clamp(max=1)
    return torch.mv(rows.t(), factors) / len(rows)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else gradient


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(results: Results) -> str:
    lines = [f"{'time/memory':20}" + "".join(f"{name:>14}" for name in ENGINES)]
    for shape, methods in results.items():
        for method, engines in methods.items():
            cells = (
                f"{r['time']:.2f}/{r['memory']:.2f}" if r else "-"
                for r in engines.values()
            )
            label = f"{shape} {method}"
            lines.append(f"{label:20}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--methods", nargs="+", choices=PEFT_METHODS, default=list(PEFT_METHODS)
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--machine", type=Path, help="a file to describe it in")
    given = parser.parse_args()
    benches = [
        Bench(shape, method, given.device, given.precision)
        for shape in given.shapes
        for method in given.methods
    ]
    # Opacus' hooks say so of every layer whose input needs no gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    results = measure(benches, given.rounds)
    if given.machine:
        description = machine(given.device, given.precision)
        given.machine.write_text(json.dumps(description, indent=2) + "\n")
    print(json.dumps(results, indent=2) if given.json else _table(results))


if __name__ == "__main__":
    main()
