"""How much of a sentence does the span attack read, whatever stands in its way?

The scenario ``audit_text``, varied: fifty clients, one real sentence each. Beside the
attack stand the prior-only control (the guess from the next client's updates) and the
baseline (the commonest tokens). One result a variant; resumable: what the result file
holds is not run again.

The first round moves the head alone, which starts at zero, and the second LoRA's B. So
four rounds that show rows of A take six; local steps take fewer.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpeft.attacks.attack import Case, Knowledge, Seen
from fedpeft.attacks.span_text import SpanText
from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.judging import judge
from fedpeft.config import RunConfig
from fedpeft.durable import write_atomically
from fedpeft.scenarios import find_scenario
from fedpeft.seeds import derive_seed, generator
from simulations.observing import observe, set_stage

_ROUNDS = ("run.rounds=6", "audit.rounds=6")

_THREAT = ThreatModel("D", "updates", "reconstruct")


@dataclass(frozen=True)
class Variant:
    """One way to train and to release.

    Attributes:
        overrides: of the scenario.
        relative_noise: added to every tensor of an update, over its norm; no privacy is
            claimed for it.
    """

    overrides: tuple[str, ...] = ()
    relative_noise: float = 0.0


VARIANTS = {
    "plain": Variant(),
    "5 local steps": Variant(("training.local_epochs=5",)),
    "rank 4": Variant(("peft.rank=4",)),
    "adamw": Variant(("training.optimizer=adamw", "training.learning_rate=0.001")),
    "noise 0.1": Variant(relative_noise=0.1),
    "epsilon 8": Variant(("privacy.unit=example",)),
    "bf16": Variant(("compression.dtype=bf16",)),
    "ternary": Variant(("compression.name=ternary", "compression.density=0.2")),
    "top 10 %": Variant(("compression.name=topk", "compression.density=0.1")),
    "top 50 %": Variant(("compression.name=topk", "compression.density=0.5")),
    "adamw, 5 local steps": Variant(
        (
            "training.optimizer=adamw",
            "training.learning_rate=0.001",
            "training.local_epochs=5",
        )
    ),
    "noise 1": Variant(relative_noise=1.0),
    "batch 8": Variant(
        (
            "data.max_examples=480",
            "data.nominal_examples=8",
            "training.batch_size=8",
        )
    ),
    "frozen A": Variant(("peft.freeze_a=true",)),
    "ssf": Variant(("peft={name='ssf'}",)),
    "bias": Variant(("peft={name='bias'}",)),
    "head": Variant(("peft={name='head'}",)),
}


def measure(name: str, victims: int) -> dict[str, Any]:
    """Runs one variant and attacks it."""
    variant = VARIANTS[name]
    text = find_scenario("audit_text").read_text(encoding="utf-8")
    overrides = [*_ROUNDS, f"audit.victims={victims}", *variant.overrides]
    config = RunConfig.from_toml(text, overrides)
    attack = SpanText(relative_noise=variant.relative_noise)
    stage = set_stage(config)
    surrogate = stage.model.task.encode(stage.surrogate)
    misfit = attack.misfit(Knowledge(stage.model, config, surrogate))
    if misfit:
        return {"overrides": overrides, "misfit": misfit}
    with tempfile.TemporaryDirectory() as output:
        cases = observe(config, Path(output) / "run")
    if variant.relative_noise:
        cases = [_noised(case, n, variant) for n, case in enumerate(cases)]
    result = judge("span_text", attack, cases, _THREAT, seed=config.run.seed)
    kept = ("victims", "metrics", "prior_only", "baseline", "difference", "seconds")
    cell = {key: dataclasses.asdict(result)[key] for key in kept}
    return {"overrides": overrides, "misfit": None, **cell}


def _noised(case: Case, number: int, variant: Variant) -> Case:
    seen = tuple(
        _with_noise(one, variant.relative_noise, number)
        for one in case.observation.seen
    )
    return dataclasses.replace(
        case, observation=dataclasses.replace(case.observation, seen=seen)
    )


def _with_noise(seen: Seen, share: float, number: int) -> Seen:
    """Adds Gaussian noise of a share of each tensor's norm."""
    rng = generator(derive_seed(number, "relative noise"), seen.server_round)
    update = {
        name: tensor
        + share
        * tensor.norm()
        / tensor.numel() ** 0.5
        * torch.randn(tensor.shape, generator=rng)
        for name, tensor in seen.update.items()
    }
    return dataclasses.replace(seen, update=update)


def table(cells: dict[str, Any]) -> str:
    """Returns the results as Markdown, one row a variant."""
    rows = [
        "| variant | token top-1 | 95 % | prior-only | baseline | exact | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        if cell["misfit"]:
            rows.append(f"| {name} | does not apply: {cell['misfit']} | | | | | |")
            continue
        own, control, trivial = (
            cell[part]["token_top1"] for part in ("metrics", "prior_only", "baseline")
        )
        rows.append(
            f"| {name} | {own['value']:.1%} | {own['low']:.1%} to {own['high']:.1%} | "
            f"{control['value']:.1%} | {trivial['value']:.1%} | "
            f"{cell['metrics']['exact_match']['value']:.0%} | {cell['victims']} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Measures what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--victims", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"cells": {}}
    if arguments.json.exists():
        record = json.loads(arguments.json.read_text(encoding="utf-8"))
    record["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    record["torch"] = torch.__version__
    for name in arguments.only:
        if name not in record["cells"]:
            record["cells"][name] = measure(name, arguments.victims)
            text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
            write_atomically(arguments.json, text.encode())
    print(table(record["cells"]))


if __name__ == "__main__":
    main()
