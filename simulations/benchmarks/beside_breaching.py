"""Our attacks on images beside breaching's, on the same model, images and updates.

`breaching` 0.1.2 (Geiping et al., MIT licence), attack ``invertinggradients``, with its
own settings but for the number of iterations, and told the true label. It is given the
gradients that follow from the last round's updates, as our gradient matching is; the
span attack reads all rounds. One thread; resumable, a victim a line.

Needs ``pip install -c constraints.txt -e ".[bench]"``, and then, without what they ask
for beside it, ``pip install --no-deps breaching==0.1.2 lpips==0.1.4``.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fedpeft.attacks._image_scores import image_scores
from fedpeft.attacks.attack import Case
from fedpeft.attacks.gradient_matching import GradientMatching
from fedpeft.attacks.span_image import SpanImage
from fedpeft.durable import write_atomically
from fedpeft.tasks import ImageClassification
from fedpeft.tensors import Tensors
from simulations.benchmarks.span_image import Cell
from simulations.observing import observe

RESULT = Path(__file__).parents[1] / "results" / "beside_breaching.json"
_FURTHER = (".datasets.utils", ".transforms")
Way = Callable[[Case], torch.Tensor]


class Trained(nn.Module):
    """A task's network of which only what trains is a parameter.

    Breaching compares gradients of all parameters, and the backbone's are not sent.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, state: Tensors) -> None:
        super().__init__()
        object.__setattr__(self, "network", network)  # no submodule: it stays hidden
        self.names = list(state)
        self.trained = nn.ParameterList(tensor.clone() for tensor in state.values())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns logits, ``(batch, classes)``."""
        state = dict(zip(self.names, self.trained, strict=True))
        inputs = {"pixel_values": pixel_values}
        logits: torch.Tensor = functional_call(self.network, state, kwargs=inputs)
        return logits


def load_breaching() -> Any:
    """Imports it without torchvision, of which it uses nothing here."""
    stubs: dict[str, ModuleType] = {}
    for part in ("", ".models", ".models.densenet", ".datasets", *_FURTHER):
        stub = ModuleType(f"torchvision{part}")
        stub.__dict__["__getattr__"] = _anything
        parent, _, name = stub.__name__.rpartition(".")
        if parent:
            setattr(stubs[parent], name, stub)
        stubs[stub.__name__] = stub
    sys.modules.update(stubs)
    try:
        return importlib.import_module("breaching")
    finally:
        for name in stubs:  # so that nobody else takes them for the real one
            del sys.modules[name]


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (nn.Module,), {})


def breaching_way(iterations: int) -> Way:
    """Returns breaching's attack of so many iterations."""
    breaching = load_breaching()
    settings = breaching.get_attack_config("invertinggradients")
    settings.optim.max_iterations = iterations

    def attack(case: Case) -> torch.Tensor:
        knowledge, seen = case.observation.knowledge, case.observation.seen[-1]
        task, rate = knowledge.model.task, knowledge.config.training.learning_rate
        assert isinstance(task, ImageClassification)
        network = Trained(knowledge.model.module, seen.state)
        setup = {"dtype": torch.float32, "device": torch.device("cpu")}
        attacker = breaching.attacks.prepare_attack(
            network, nn.CrossEntropyLoss(), settings, setup
        )
        size = task.image_size
        payload = {
            "parameters": list(seen.state.values()),
            "buffers": [],
            "metadata": SimpleNamespace(
                shape=(3, size, size),
                classes=10,
                mean=task.mean,
                std=task.deviation,
                modality="vision",
            ),
        }
        shared = {
            "gradients": [-tensor / rate for tensor in seen.update.values()],
            "buffers": None,
            "metadata": {
                "num_data_points": 1,
                "labels": case.secret.examples.labels,
                "local_hyperparams": None,
                "data_key": "inputs",
            },
        }
        found, _ = attacker.reconstruct([payload], [shared], {})
        mean_, deviation = (
            torch.tensor(values).view(3, 1, 1) for values in (task.mean, task.deviation)
        )
        image: torch.Tensor = found["data"].detach() * deviation + mean_
        return image

    return attack


def ours(attack: SpanImage | GradientMatching) -> Way:
    """Returns one of our attacks."""
    rng = torch.Generator().manual_seed(0)
    return lambda case: attack.run(case.observation, rng)


def main() -> None:
    """Attacks every victim by every way, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--victims", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # breaching draws its start from it
    table = json.loads(RESULT.read_text()) if RESULT.exists() else {"victims": {}}
    with tempfile.TemporaryDirectory() as folder:
        config = Cell("").config()
        cases = observe(config, Path(folder) / "run")
    ways: dict[str, Way] = {
        "ours: span_image": ours(SpanImage()),
        "ours: gradient_matching": ours(GradientMatching()),
        f"breaching: {arguments.iterations}": breaching_way(arguments.iterations),
    }
    ways["ours: span_image"](cases[0])  # what it learns of public images is kept
    for number, case in enumerate(cases[: arguments.victims]):
        for name, way in ways.items():
            key = f"{name} | victim {number}"
            if key not in table["victims"]:
                table["victims"][key] = found = _timed(way, case)
                print(key, found, flush=True)
                table["means"] = _means(table["victims"])
                write_atomically(RESULT, (json.dumps(table, indent=2) + "\n").encode())
    print(f"written: {RESULT}")


def _timed(way: Way, case: Case) -> dict[str, float]:
    started = time.process_time()
    guess = way(case)
    seconds = time.process_time() - started
    scores = {name: v.item() for name, v in image_scores(guess, case.secret).items()}
    return {**scores, "cpu_seconds": round(seconds, 2)}


def _means(victims: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    names = sorted({key.split(" | ")[0] for key in victims})
    rows = {
        name: [found for key, found in victims.items() if key.startswith(f"{name} |")]
        for name in names
    }
    return {
        name: {key: round(mean(row[key] for row in found), 4) for key in found[0]}
        for name, found in rows.items()
    }


if __name__ == "__main__":
    main()
