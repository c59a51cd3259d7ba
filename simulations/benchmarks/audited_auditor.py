"""Does the audit find a privacy bug? Every bug of the tests is planted and audited.

Each is put into a copy of the source, in which an audit by canaries runs in a process
of its own. A bug that raises the epsilon of what is observed above what is claimed must
be found; one that does not must not be. The true epsilon is worked out by hand: the
formula stands with each. A bug cannot be told from its absence by an observer for whom
nothing changes; those are named, with the reason.
"""

import argparse
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedpeft.config import RunConfig
from fedpeft.privacy import Composition, Plan, epsilon, make_plan

Effect = Literal["raises", "harmless", "invisible"]
Unit = Literal["example", "person", "client"]

SCENARIO = """
[run]
rounds = 8
[data]
path = "nobody-reads-this.csv"
labels = ["rotten", "fresh"]
person = "writer"
nominal_examples = 512
nominal_persons = 512
[partition]
name = "iid"
num_clients = 4
[model]
backbone = "minilm"
[peft]
name = "lora"
rank = 4
freeze_a = true
first_layer = 4
[training]
optimizer = "sgd"
learning_rate = 0.5
batch_size = 128
[cohort]
size = 2
[privacy]
target_epsilon = 8.0
[compression]
name = "dense"
"""
"""A client takes part in four rounds of four steps, each at rate 1/4."""

SETTINGS = {
    "example": ("privacy.unit=example",),
    "person": ("privacy.unit=person",),
    "client": ("privacy.unit=client", "cohort.sampling=poisson"),
}
"""What makes the three runs differ."""

_FILE = "audited.toml"
_TENSORS = 6
"""That train: B of two layers' query and value, weight and bias of the head."""


@dataclass(frozen=True)
class Expected:
    """What one bug does to the epsilon of what is observed.

    Attributes:
        effect: ``raises`` it, is ``harmless``, or changes nothing that is observed.
        why: in a sentence; for a finite epsilon how it is worked out.
        truth: the plan -> the true epsilon; None where the plan's holds.
        claimed: the plan -> what is claimed, if it is not the plan's.
        unit: of the run that is audited.
    """

    effect: Effect
    why: str
    truth: Callable[[Plan], float] | None = None
    claimed: Callable[[Plan], float] | None = None
    unit: Unit = "example"


def _infinite(plan: Plan) -> float:
    return math.inf


def _moved_by(norms: float) -> Callable[[Plan], float]:
    """One unit moves a sum by so many clipping norms: that much less noise."""

    def truth(plan: Plan) -> float:
        done = plan.composition(plan.max_participations)
        noise = done.noise_multiplier / norms
        return _epsilon(plan, Composition(noise, done.sampling_rate, done.steps))

    return truth


def _at_rate(rate: float) -> Callable[[Plan], float]:
    def truth(plan: Plan) -> float:
        done = plan.composition(plan.max_participations)
        return _epsilon(plan, Composition(done.noise_multiplier, rate, done.steps))

    return truth


def _after(rounds: float) -> Callable[[Plan], float]:
    """Of so many runs' rounds; 0 stands for a single round."""

    def truth(plan: Plan) -> float:
        participations = round(rounds * plan.max_participations) or 1
        return _epsilon(plan, plan.composition(participations))

    return truth


def _epsilon(plan: Plan, done: Composition) -> float:
    return epsilon([done], plan.target_delta)


EXPECTED = {
    "noise forgotten": Expected(
        "raises",
        "Sums without noise. (Release counts the noise drawn and sends nothing.)",
        _infinite,
    ),
    "noise scaled by the batch": Expected(
        "harmless",
        "Noise on the mean in place of the sum: a batch size times too much.",
        _moved_by(1 / 128),
    ),
    "noise reused": Expected(
        "raises",
        "The same noise always: a difference of two releases has none.",
        _infinite,
    ),
    "clip after the sum": Expected(
        "raises",
        "One unit turns a clipped sum around: it moves by 2 norms, sigma / 2.",
        _moved_by(2),
    ),
    "clip per tensor": Expected(
        "raises",
        f"Each of {_TENSORS} tensors may move by a norm: sigma / sqrt({_TENSORS}).",
        _moved_by(math.sqrt(_TENSORS)),
    ),
    "last physical batch unclipped": Expected(
        "raises", "Nothing bounds what one unit does there.", _infinite
    ),
    "wrong sampling rate": Expected(
        "raises", "Batches at rate 0.75 in place of 0.25.", _at_rate(0.75)
    ),
    "accountant reset each round": Expected(
        "raises",
        "The ledger states one round's epsilon after all rounds.",
        _after(1),
        claimed=_after(0),
    ),
    "budget of the last release alone": Expected(
        "raises",
        "The budget of one run allows another: at least two runs' rounds.",
        _after(2),
    ),
    "empty batch skipped": Expected(
        "raises",
        "A client without examples never moves the model; with one it does.",
        _infinite,
    ),
    "duplicate example": Expected(
        "raises",
        "The first of a batch counts twice: a new first one adds two norms and takes "
        "away one of the next: 3 norms, sigma / 3.",
        _moved_by(3),
    ),
    "more of a person than the plan allows": Expected(
        "raises",
        "Clipped as one all the same; but rows beyond a physical batch make the "
        "answer fail, and that is seen.",
        _infinite,
        unit="person",
    ),
    "ledger written after sending": Expected(
        "raises",
        "Until the client is asked again, its ledger lacks an answer that is out.",
        _after(0),
        claimed=lambda plan: 0.0,
    ),
    "metrics of what nothing noises": Expected(
        "invisible",
        "Updates and models stay what they are; metrics of local parts are published, "
        "in runs that have such parts, and no canary looks at metrics.",
        unit="client",
    ),
    "weights by private counts": Expected(
        "raises", "The reply tells the exact number of examples.", _infinite
    ),
    "NaN row dropping the step": Expected(
        "raises",
        "One unit takes the 31 others of its physical batch away: sigma / 31.",
        _moved_by(31),
    ),
    "second answer to one request": Expected(
        "harmless",
        "Every answer is charged and the plan's cap counts them: budget is wasted, "
        "never exceeded.",
    ),
    "plan read from the server": Expected(
        "harmless",
        "The request's plan is not compared, but nothing reads it either: the client "
        "trains by its own.",
    ),
    "person's rows clipped one by one": Expected(
        "raises",
        "8 rows of a person in a step, a norm each: sigma / 8.",
        _moved_by(8),
        unit="person",
    ),
    "a client's update unclipped": Expected(
        "raises", "Nothing bounds what one client does.", _infinite, unit="client"
    ),
    "an empty cohort skipped": Expected(
        "raises",
        "A round that nobody is drawn for stops the run; with one more client drawn "
        "it does not.",
        _infinite,
        unit="client",
    ),
    "data told by the ledger's head": Expected(
        "raises",
        "Who knows all but one record recomputes the acknowledged hash.",
        _infinite,
    ),
    "cohort size published": Expected(
        "raises",
        "Who knows of the others learns who was drawn: nothing is amplified, rate 1.",
        _at_rate(1.0),
        unit="client",
    ),
    "secret cohort drawn again": Expected(
        "invisible",
        "One cohort's round is released, whichever of the two it is; that there was "
        "another shows in the server's own file alone.",
        unit="client",
    ),
}
"""By the names that the tests give to the bugs."""


@dataclass(frozen=True)
class Found:
    """What an audit said.

    Attributes:
        is_refuted: whether the claim was.
        refuted: by which trials and checks.
        seconds: of wall time, imports included.
    """

    is_refuted: bool
    refuted: list[str]
    seconds: float


def audit(folder: Path, unit: Unit, seconds: float) -> Found:
    """Audits the source in a folder, in a process of its own."""
    settings = [f"--set={pair}" for pair in SETTINGS[unit]]
    (folder / _FILE).write_text(SCENARIO)
    started = time.perf_counter()
    run = subprocess.run(
        [
            *(sys.executable, "-m", "simulations.canaries", _FILE, *settings),
            *("--seconds", str(seconds), "--json"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode not in (0, 2):
        raise RuntimeError(run.stderr)
    refuted = sorted(set(json.loads(run.stdout)["refuted"]))
    spent = round(time.perf_counter() - started, 1)
    return Found(run.returncode == 2, refuted, spent)


def plant(name: str, folder: Path) -> None:
    """Copies the source and puts a bug in; the empty name puts none."""
    tests = importlib.import_module("tests.privacy.test_planted_bugs")
    for package in tests.PACKAGES:
        source = tests.ROOT / package
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / package)
    if name:
        bug = tests.BUGS[name]
        path = folder / bug.file
        text = path.read_text()
        if text.count(bug.line) != 1:
            raise ValueError(f"{bug.file}: expected one such line, got another number.")
        path.write_text(text.replace(bug.line, bug.mutant))


def measure(name: str, budgets: Sequence[float]) -> dict[str, Any]:
    """Plants one bug and returns what is true beside what the audit says.

    Args:
        name: of the bug.
        budgets: seconds that an audit may take. A bug that raises epsilon and is not
            found is audited again with the next one.
    """
    expected = EXPECTED[name]
    plan, raises = plan_of(expected.unit), expected.effect == "raises"
    with tempfile.TemporaryDirectory() as folder:
        plant(name, Path(folder))
        for budget in budgets:
            found = audit(Path(folder), expected.unit, budget)
            if found.is_refuted or not raises:
                break
    claimed = expected.claimed(plan) if expected.claimed else plan.planned_epsilon
    truth = expected.truth(plan) if expected.truth else claimed
    return {
        "bug": name,
        "effect": expected.effect,
        "unit": expected.unit,
        "claimed_epsilon": round(claimed, 3),
        "true_epsilon": "infinite" if math.isinf(truth) else round(truth, 3),
        "why": expected.why,
        "falsified": found.is_refuted,
        "refuted": found.refuted,
        "seconds_asked": budget,
        "seconds": found.seconds,
        "as_expected": found.is_refuted == raises,
    }


def plan_of(unit: Unit) -> Plan:
    """Returns the plan of the run that is audited."""
    plan = make_plan(RunConfig.from_toml(SCENARIO, SETTINGS[unit]))
    assert plan is not None
    return plan


def without_bugs(unit: Unit, seconds: float) -> dict[str, Any]:
    """Audits the source as it is."""
    with tempfile.TemporaryDirectory() as folder:
        plant("", Path(folder))
        found = audit(Path(folder), unit, seconds)
    return {
        "unit": unit,
        "claimed_epsilon": round(plan_of(unit).planned_epsilon, 3),
        "falsified": found.is_refuted,
        "refuted": found.refuted,
        "seconds": found.seconds,
    }


def main() -> None:
    """Prints one line a bug, and all of it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, nargs="+", default=[20.0, 120.0])
    parser.add_argument("--bug", choices=list(EXPECTED), help="this one alone")
    arguments = parser.parse_args()
    names = [arguments.bug] if arguments.bug else list(EXPECTED)
    rows = []
    for name in names:
        rows.append(measure(name, arguments.seconds))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    units: tuple[Unit, ...] = () if arguments.bug else ("example", "person", "client")
    clean = [without_bugs(unit, arguments.seconds[0]) for unit in units]
    if arguments.json:
        print(json.dumps({"bugs": rows, "no_bug": clean}, indent=2))
    is_good = all(row["as_expected"] for row in rows)
    sys.exit(0 if is_good and not any(row["falsified"] for row in clean) else 1)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{'ok' if row['as_expected'] else 'UNEXPECTED':11}{row['bug']}: "
        f"{row['effect']}, claimed {row['claimed_epsilon']}, true "
        f"{row['true_epsilon']}, falsified {row['falsified']} by {row['refuted']}, "
        f"{row['seconds']} s"
    )


if __name__ == "__main__":
    main()
