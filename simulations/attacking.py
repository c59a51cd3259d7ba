"""Gives every attack just what it needs, and has it judged."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeft.attacks import ATTACKS
from fedpeft.attacks.attack import Attack, Case, Knowledge, Observation
from fedpeft.attacks.threats import Access, ReleaseForm, ThreatModel
from fedpeft.audit.judging import judge
from fedpeft.audit.results import AttackResult, Column
from fedpeft.config import RunConfig, build
from fedpeft.errors import FedpeftError
from fedpeft.sections import Component
from fedpeft.seeds import generator
from simulations.aggregates import only_aggregates
from simulations.observing import Stage, is_suspected, provoke, with_candidates
from simulations.planting import planted_cases
from simulations.references import with_references

Say = Callable[[str], None]
"""Is told what is being done."""

_MEMBERS = 8
"""Records of one client that membership is asked of, at most."""


def run_attacks(
    stage: Stage, cases: Sequence[Case], column: Column, say: Say
) -> list[AttackResult]:
    """Tries every attack that the configuration asks for; all of them by default.

    On what a server sees first; then, if that is asked for, on what all see.
    """
    views: list[tuple[Access | None, Sequence[Case]]] = [(None, cases)]
    if attacks_aggregates(stage.config):
        views.append(("aggregate", only_aggregates(cases)))
    results = []
    for access, shown in views:
        for name, attack in attacks_of(stage.config):
            if column == "this-run" and _makes_its_own(attack):
                continue  # what it looks at would be no part of this run
            if access not in (None, attack.needs.access):
                continue
            say(f"attack: {name}{' on aggregates' if access else ''}")
            results.append(_run_attack(stage, name, attack, shown, column, access))
    return results


def attacks_aggregates(config: RunConfig) -> bool:
    """Whether attacks are given aggregates too: if asked for, or all that is claimed.

    Epsilon of unit ``client`` speaks of nothing less.
    """
    return config.audit.aggregate or config.privacy.unit == "client"


def _makes_its_own(attack: Attack[Any]) -> bool:
    """Whether it is active, or looks for what the auditor has planted."""
    return attack.needs.adversary in "FGH" or attack.needs.goal == "extract"


def attacks_of(config: RunConfig) -> list[tuple[str, Attack[Any]]]:
    """Builds the attacks that a configuration asks for.

    Raises:
        ConfigError: for an unknown one, or a value that it refuses.
    """
    named = config.audit.attacks
    sections = named or tuple(Component(name=name) for name in ATTACKS)
    return [
        (section.name, build(ATTACKS, section, "audit.attacks")) for section in sections
    ]


def _run_attack(
    stage: Stage,
    name: str,
    attack: Attack[Any],
    cases: Sequence[Case],
    column: Column,
    access: Access | None,
) -> AttackResult:
    """Gives an attack just what it needs, and judges it.

    Args:
        stage: of the audit.
        name: of the attack.
        attack: with its hyperparameters.
        cases: one a victim.
        column: where they come from.
        access: that they grant; None finds out.
    """
    needs, facts = attack.needs, {}
    cases, lack = _usable(attack, cases)
    access = access or _granted(needs, cases)
    if needs.goal == "membership":
        cases = with_candidates(cases, members=_MEMBERS)
        if access == "final-model":
            cases, lack = _with_references(stage, cases)
    fits = bool(cases) and attack.misfit(cases[0].observation.knowledge) is None
    if fits and needs.goal == "extract":
        with tempfile.TemporaryDirectory() as folder:
            cases = planted_cases(stage.config, Path(folder))
    if fits and needs.adversary in "FGH":
        rng = generator(stage.config.run.seed, name, "craft")
        crafted = attack.craft(cases[0].observation.knowledge, rng)
        if crafted is not None:
            cases = provoke(stage, crafted)
            facts = {"clients refuse the state": is_suspected(stage, crafted)}
    form = release_form(stage.config, access)
    threat = replace(needs, access=access, release=form)
    is_adaptive = stage.config.training.optimizer == "adamw"
    if attack.undoes_optimizer and threat.adversary in "AB" and is_adaptive:
        threat = replace(threat, adversary="C")
    seed = stage.config.run.seed
    result = judge(
        name,
        attack,
        cases,
        threat,
        seed=seed,
        column=column,
        classes=stage.decoys.label_names,
    )
    misfit = lack if result.misfit and lack else result.misfit
    return replace(result, settings={**result.settings, **facts}, misfit=misfit)


def _usable(
    attack: Attack[Any], cases: Sequence[Case]
) -> tuple[Sequence[Case], str | None]:
    """Leaves out victims of whom too little was seen; says why if none or 1 is left."""
    lacks = [_lack(attack, case.observation) for case in cases]
    usable = [case for case, lack in zip(cases, lacks, strict=True) if lack is None]
    return usable, next(filter(None, lacks), None) if len(usable) < 2 else None


def _lack(attack: Attack[Any], observation: Observation) -> str | None:
    if not observation.seen and attack.needs.access == "aggregate":
        return "what became of the rounds was not seen"
    return attack.unusable(observation)


def _granted(needs: ThreatModel, cases: Sequence[Case]) -> Access:
    """Returns what is really shown: an attack may look at all rounds that it is given.

    A replay that stopped early has no model to look at.
    """
    if needs.access == "final-model":
        is_over = any(case.observation.final is not None for case in cases)
        return "final-model" if is_over or needs.goal == "extract" else "update"
    several = any(len(case.observation.seen) > 1 for case in cases)
    return "updates" if several and needs.adversary not in "FGH" else "update"


def _with_references(
    stage: Stage, cases: Sequence[Case]
) -> tuple[list[Case], str | None]:
    """Gives all the same reference models, and the released one alone to attack.

    Where none can be trained, such as where something stays at the clients, says why.
    """
    knowledge, lack = cases[0].observation.knowledge, None
    try:
        knowledge = with_references(knowledge, len(stage.decoys.label_names))
    except FedpeftError as error:
        lack = f"there are no reference models: {str(error).removesuffix('.')}"
    alone = [
        replace(case, observation=_of_model(case.observation, knowledge))
        for case in cases
    ]
    return alone, lack


def _of_model(observation: Observation, knowledge: Knowledge) -> Observation:
    return Observation(
        knowledge, final=observation.final, candidates=observation.candidates
    )


def release_form(config: RunConfig, access: Access) -> ReleaseForm:
    """Returns what has been done to what is seen.

    A server that owes privacy adds its noise to the sum: to all but single updates.
    """
    is_single = access in ("update", "updates")
    noised = config.is_dp_sgd or (config.privacy.unit == "client" and not is_single)
    dense = config.compression.name == "dense"
    if noised:
        return "noised" if dense else "noised-compressed"
    return "raw" if dense else "compressed"
