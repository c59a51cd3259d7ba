"""Runs an attack on every victim and sets the outcome beside its controls."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedpeft.attacks.attack import (
    Attack,
    Case,
    Observation,
    Scores,
    neighbours,
    with_updates_of,
)
from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.estimating import differences, estimate, estimates
from fedpeft.audit.exhibits import choose_exhibits
from fedpeft.audit.results import AttackResult, Column, Exhibit, Slice
from fedpeft.seeds import derive_seed, generator

_DECIMALS = 4


class _Run(NamedTuple):
    """One victim: what was guessed, of its control too, and all scores."""

    guesses: tuple[Any, Any]
    own: Scores
    control: Scores
    trivial: Scores


def judge(
    name: str,
    attack: Attack[Any],
    cases: Sequence[Case],
    threat: ThreatModel,
    *,
    seed: int,
    column: Column = "replay",
    classes: Sequence[str] = (),
) -> AttackResult:
    """Attacks every case, and every case's control: mostly another one's updates.

    **Guarantees**: an attack that needs more than is granted is not run. What it is
    given holds no secret. Equal seeds give equal results. Fewer than two cases leave no
    control: the result says so. Only of a replay is anything shown.

    Args:
        name: the attack's id.
        attack: with its hyperparameters.
        cases: one a victim.
        threat: what is granted.
        seed: of the attack's own randomness.
        column: where the observations come from.
        classes: names of the records' labels; none, or one, for records without.
    """
    started = time.perf_counter()
    misfit = _misfit(attack, cases, threat)
    runs = [] if misfit else _run_all(name, attack, cases, seed)
    own, controls = [run.own for run in runs], [run.control for run in runs]
    units = dict(attack.metrics)
    is_of_data = attack.needs.goal != "expose"  # else a class makes no difference
    return AttackResult(
        attack=name,
        column=column,
        threat=threat,
        units=units,
        victims=len(runs),
        records=sum(len(next(iter(scores.values()))) for scores in own),
        metrics=estimates(own, units, seed),
        baseline=estimates([run.trivial for run in runs], units, seed),
        prior_only=estimates(controls, units, seed),
        difference=differences(own, controls, units, seed),
        settings=dataclasses.asdict(attack),  # type: ignore[call-overload]
        seconds=round(time.perf_counter() - started, 1),
        misfit=misfit,
        values=_values(own, units),
        control_values=_values(controls, units),
        by_class=_by_class(cases, runs, units, classes, seed) if is_of_data else {},
        exhibits=_exhibits(attack, cases, runs) if column == "replay" else (),
    )


def _misfit(
    attack: Attack[Any], cases: Sequence[Case], threat: ThreatModel
) -> str | None:
    """Says why the attack cannot be judged; None if it can."""
    lacking = threat.lacks(attack.needs)
    if lacking:
        return f"it needs {' and '.join(lacking)}"
    if len(cases) < 2:
        count = "1 was" if cases else "none was"
        return (
            f"at least two clients must be seen for a prior-only control, and {count}"
        )
    return attack.misfit(cases[0].observation.knowledge)


def _run_all(
    name: str, attack: Attack[Any], cases: Sequence[Case], seed: int
) -> list[_Run]:
    """Attacks each case, and runs its two controls."""
    guesses = [
        attack.run(case.observation, generator(seed, name, index))
        for index, case in enumerate(cases)
    ]
    runs = []
    for index, (case, other) in enumerate(zip(cases, neighbours(cases), strict=True)):
        control = guesses[(index + 1) % len(cases)]
        asked = case.control or _control(case.observation, other.observation)
        if asked is not None:
            control = attack.run(asked, generator(seed, name, "control", index))
        rng = generator(seed, name, "baseline", index)
        runs.append(
            _Run(
                (guesses[index], control),
                attack.score(guesses[index], case.secret),
                attack.score(control, case.secret),
                attack.baseline(case.observation, case.secret, rng),
            )
        )
    return runs


def _control(mine: Observation, other: Observation) -> Observation | None:
    """Returns what the control is run on; None where the other's own guess will do."""
    if mine.candidates is None:
        return None
    if mine.seen or not mine.knowledge.references:
        return with_updates_of(mine, other)
    # Where only the model is seen, all see the same: the control is another model.
    stranger, *rest = mine.knowledge.references
    members = mine.knowledge.reference_members
    knowledge = dataclasses.replace(
        mine.knowledge,
        references=tuple(rest),
        reference_members=None if members is None else members[1:],
    )
    return dataclasses.replace(mine, knowledge=knowledge, final=stranger)


def _values(
    scores: Sequence[Scores], units: dict[str, str]
) -> dict[str, tuple[float, ...]]:
    """Returns every record's value, by metric."""
    measured = [metric for metric in units if scores and metric in scores[0]]
    return {
        metric: tuple(
            round(value, _DECIMALS)
            for one in scores
            for value in one[metric].double().tolist()
        )
        for metric in measured
    }


def _headline(runs: Sequence[_Run], units: dict[str, str]) -> str:
    return next(metric for metric in units if metric in runs[0].own)


def _by_class(
    cases: Sequence[Case],
    runs: Sequence[_Run],
    units: dict[str, str],
    classes: Sequence[str],
    seed: int,
) -> dict[str, Slice]:
    """Judges by class where each victim has records of one class alone."""
    labels = [case.secret.examples.labels for case in cases] if runs else []
    if len(classes) < 2 or any(
        each.dim() != 1 or len(set(each.tolist())) != 1 for each in labels
    ):
        return {}
    groups: dict[int, list[_Run]] = {}
    for each, run in zip(labels, runs, strict=True):
        groups.setdefault(int(each[0]), []).append(run)
    return {
        classes[label]: _slice(group, units, derive_seed(seed, "class", label))
        for label, group in sorted(groups.items())
    }


def _slice(runs: Sequence[_Run], units: dict[str, str], seed: int) -> Slice:
    metric = _headline(runs, units)
    found, control = (
        estimate([scores[metric].double() for scores in part], units[metric], seed)
        for part in ([run.own for run in runs], [run.control for run in runs])
    )
    return Slice(len(runs), found, control)


def _exhibits(
    attack: Attack[Any], cases: Sequence[Case], runs: Sequence[_Run]
) -> tuple[Exhibit, ...]:
    if not runs:
        return ()
    metric = _headline(runs, attack.metrics)
    own, control = (
        [round(float(scores[metric][0]), _DECIMALS) for scores in part]
        for part in ([run.own for run in runs], [run.control for run in runs])
    )
    scores = list(zip(own, control, strict=True))
    return choose_exhibits(attack, cases, [run.guesses for run in runs], scores)
