"""What of an image comes back: release by release, by the attacks on images.

The scenario ``audit_image`` with fewer victims, one change each. Every cell has the
attack, its prior-only control and the mean image beside each other. Nothing was tuned
on these images: that was done with another ``split_seed``. Resumable: what the result
file holds is not run again.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpeft.attacks.attack import Attack
from fedpeft.attacks.gradient_matching import GradientMatching
from fedpeft.attacks.span_image import SpanImage
from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.judging import judge
from fedpeft.config import RunConfig
from fedpeft.durable import write_atomically
from simulations.benchmarks.vit_shapes import uniqueness
from simulations.observing import observe

SCENARIO = Path(__file__).parents[1] / "audit_image.toml"
RESULT = Path(__file__).parents[1] / "results" / "span_image.json"
THREAT = ThreatModel("D", "updates", "reconstruct")

COMMON = (
    "training.learning_rate=0.05",
    "peft={name='lora', rank=8, target_modules=['q_proj', 'k_proj', 'v_proj']}",
)
PAIRS = ("data.max_examples=48", "data.nominal_examples=2", "training.batch_size=2")
LORA_B = "peft={name='lora', rank=8, freeze_a=true}"


@dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        name: in the result file.
        overrides: of the scenario.
        attack: with its hyperparameters.
        victims: clients, each with its own image or images.
    """

    name: str
    overrides: tuple[str, ...] = ()
    attack: Attack[Any] = dataclasses.field(default_factory=SpanImage)
    victims: int = 20

    def config(self) -> RunConfig:
        """Returns the run's configuration; few victims still leave both classes."""
        held_out = 10 if self.victims < 20 else self.victims // 5
        sizes = (
            f"partition.num_clients={self.victims}",
            f"cohort.size={self.victims}",
            f"data.max_examples={self.victims + held_out}",
            f"data.test_fraction={held_out / (self.victims + held_out)}",
        )
        text = SCENARIO.read_text(encoding="utf-8")
        return RunConfig.from_toml(text, [*COMMON, *sizes, *self.overrides])


MATCHING = GradientMatching()
CELLS = (
    Cell("span | plain", victims=50),
    Cell("span | epsilon 8", ("privacy.unit='example'",), victims=50),
    Cell(
        "span | epsilon 1000", ("privacy.unit='example'", "privacy.target_epsilon=1000")
    ),
    Cell("span | closed form alone", attack=SpanImage(iterations=0)),
    Cell("span | one useful round", ("run.rounds=3",)),
    Cell("span | rank 2", ("peft={name='lora', rank=2}",)),
    Cell("span | 5 local steps", ("training.local_epochs=5",)),
    Cell("span | AdamW", ("training.optimizer='adamw'", "training.learning_rate=1e-3")),
    Cell("span | ternary", ("compression={name='ternary', density=0.2}",)),
    Cell("span | top-k 0.1", ("compression={name='topk', density=0.1}",)),
    Cell("span | 56 pixels", ("data.image_size=56",), victims=5),
    Cell("span | 2 images", PAIRS, SpanImage(num_images=2), victims=10),
    Cell("span | frozen A", (LORA_B,), victims=3),
    Cell("span | SSF", ("peft={name='ssf'}",), victims=3),
    Cell("matching | plain", attack=MATCHING, victims=5),
    Cell("matching | epsilon 8", ("privacy.unit='example'",), MATCHING, 5),
    Cell("matching | frozen A", (LORA_B,), MATCHING, 5),
    Cell("matching | SSF", ("peft={name='ssf'}",), MATCHING, 5),
    Cell("matching | head alone", ("peft={name='head'}",), MATCHING, 5),
    Cell(
        "matching | AdamW",
        ("training.optimizer='adamw'", "training.learning_rate=1e-3"),
        MATCHING,
        5,
    ),
)


def measure(cell: Cell) -> dict[str, Any]:
    """Simulates the run, recorded, and attacks every client."""
    with tempfile.TemporaryDirectory() as folder:
        cases = observe(cell.config(), Path(folder) / "run")
    result = judge(cell.name, cell.attack, cases, THREAT, seed=0)
    found = dataclasses.asdict(result)
    kept = ("victims", "records", "metrics", "baseline", "prior_only", "misfit")
    seconds = result.seconds / max(1, 2 * result.victims)
    return {
        "overrides": cell.overrides,
        "settings": found["settings"],
        "seconds_a_victim": round(seconds, 2),
        **{key: found[key] for key in kept},
    }


def main() -> None:
    """Fills the table cell by cell, then tries the condition of uniqueness."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="part of a cell's name")
    only: Sequence[str] | None = parser.parse_args().only
    torch.set_num_threads(1)
    table = json.loads(RESULT.read_text()) if RESULT.exists() else {"cells": {}}
    for cell in CELLS:
        if _is_wanted(cell.name, only) and cell.name not in table["cells"]:
            table["cells"][cell.name] = found = measure(cell)
            print(cell.name, found["metrics"].get("psnr", found["misfit"]), flush=True)
            _save(table)
    if _is_wanted("uniqueness", only) and "uniqueness" not in table:
        table["uniqueness"] = uniqueness()
        _save(table)
    print(f"written: {RESULT}")


def _is_wanted(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(part in name for part in only)


def _save(table: dict[str, Any]) -> None:
    table["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    table["scenario"], table["common"] = SCENARIO.read_text(), COMMON
    write_atomically(RESULT, (json.dumps(table, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
