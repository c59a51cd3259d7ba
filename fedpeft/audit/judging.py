"""Runs an attack on every victim and sets the outcome beside its controls."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from fedpeft.attacks.attack import (
    Attack,
    Case,
    Observation,
    Scores,
    neighbours,
    with_updates_of,
)
from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.intervals import bootstrap_mean, clopper_pearson, may_hide_others
from fedpeft.audit.results import AttackResult, Column, Estimate
from fedpeft.seeds import derive_seed, generator

_LEVEL = 0.05


def judge(
    name: str,
    attack: Attack[Any],
    cases: Sequence[Case],
    threat: ThreatModel,
    *,
    seed: int,
    column: Column = "replay",
) -> AttackResult:
    """Attacks every case, and every case with another one's updates.

    **Guarantees**: an attack that needs more than is granted is not run. What it is
    given holds no secret. Equal seeds give equal results. Fewer than two cases leave no
    control: the result says so.

    Args:
        name: the attack's id.
        attack: with its hyperparameters.
        cases: one a victim.
        threat: what is granted.
        seed: of the attack's own randomness.
        column: where the observations come from.
    """
    started = time.perf_counter()
    misfit = _misfit(attack, cases, threat)
    runs = [] if misfit else _run_all(name, attack, cases, seed)
    own, controls, trivial = ([run[part] for run in runs] for part in range(3))
    units = dict(attack.metrics)
    return AttackResult(
        attack=name,
        column=column,
        threat=threat,
        units=units,
        victims=len(runs),
        records=sum(len(next(iter(scores.values()))) for scores in own),
        metrics=_estimates(own, units, seed),
        baseline=_estimates(trivial, units, seed),
        prior_only=_estimates(controls, units, seed),
        difference=_differences(own, controls, units, seed),
        settings=dataclasses.asdict(attack),  # type: ignore[call-overload]
        seconds=round(time.perf_counter() - started, 1),
        misfit=misfit,
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
) -> list[tuple[Scores, Scores, Scores]]:
    """Returns the scores of each case: attacked, its control, its baseline."""
    guesses = [
        attack.run(case.observation, generator(seed, name, index))
        for index, case in enumerate(cases)
    ]
    runs = []
    for index, (case, other) in enumerate(zip(cases, neighbours(cases), strict=True)):
        control = guesses[(index + 1) % len(cases)]
        asked = _control(case.observation, other.observation)
        if asked is not None:
            control = attack.run(asked, generator(seed, name, "control", index))
        rng = generator(seed, name, "baseline", index)
        runs.append(
            (
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


def _estimates(
    scores: Sequence[Scores], units: dict[str, str], seed: int
) -> dict[str, Estimate]:
    if not scores:
        return {}
    return {
        metric: _estimate(
            [one[metric].double() for one in scores], unit, derive_seed(seed, metric)
        )
        for metric, unit in units.items()
        if metric in scores[0]  # an attack leaves out what it could not resolve
    }


def _estimate(values: Sequence[torch.Tensor], unit: str, seed: int) -> Estimate:
    """Returns the mean over victims; records of one victim depend on each other."""
    together = torch.cat(list(values))
    is_binary = bool(((together == 0) | (together == 1)).all())
    if is_binary and all(len(value) == 1 for value in values):
        successes, trials = int(together.sum()), len(together)
        low, high = clopper_pearson(successes, trials, _LEVEL)
        return Estimate(successes / trials, low, high, "Clopper-Pearson")
    return _bootstrap([float(value.mean()) for value in values], unit, 0.0, seed)


def _differences(
    own: Sequence[Scores], controls: Sequence[Scores], units: dict[str, str], seed: int
) -> dict[str, Estimate]:
    """Returns attack minus control, paired by victim."""
    if not own:
        return {}
    return {
        metric: _bootstrap(
            [
                float(mine[metric].double().mean() - other[metric].double().mean())
                for mine, other in zip(own, controls, strict=True)
            ],
            unit,
            -1.0,
            derive_seed(seed, metric, "difference"),
        )
        for metric, unit in units.items()
        if metric in own[0]
    }


def _bootstrap(means: Sequence[float], unit: str, least: float, seed: int) -> Estimate:
    is_share = unit == "share"
    bounds = {"least": least, "largest": 1.0} if is_share else {}
    low, high = bootstrap_mean(means, seed=seed, alpha=_LEVEL, **bounds)
    mean = sum(means) / len(means)
    unseen = ", and a share of unseen others" if is_share else ""
    method = "BCa bootstrap and Student t over victims"
    return Estimate(
        mean, low, high, method + (unseen if may_hide_others(means) else "")
    )
