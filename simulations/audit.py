"""Puts an audit together: a run's own records, and attacks on public data.

The two columns of evidence meet here and nowhere before: what a run's files say, and
what happens to victims with public data under the same configuration and code.
"""

import contextlib
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric import x25519
from safetensors.torch import load_file

from client.holding import read_records as read_dealt
from fedpeft.attacks import ATTACKS
from fedpeft.attacks.attack import Attack, Case, Knowledge, Observation
from fedpeft.attacks.rank_budget import rank_budget
from fedpeft.attacks.threats import Access, ReleaseForm, ThreatModel
from fedpeft.audit.evidence import (
    check_records,
    claim_of,
    federation_of,
    read_run,
    release_of,
    system_of,
)
from fedpeft.audit.judging import judge
from fedpeft.audit.observing import seen_by_client
from fedpeft.audit.recording import FOLDER, Records, read_records
from fedpeft.audit.results import AttackResult, Audit, Check, Column, DpTrial
from fedpeft.audit.trials import LIMITATIONS
from fedpeft.config import RunConfig, build
from fedpeft.errors import ConfigError
from fedpeft.model import TaskModel
from fedpeft.privacy import data_sources
from fedpeft.sections import Component
from fedpeft.seeds import generator
from simulations.canaries import examine
from simulations.observing import (
    Stage,
    cases_of,
    is_suspected,
    observe,
    provoke,
    set_stage,
    with_candidates,
)
from simulations.planting import planted_cases
from simulations.references import with_references

Say = Callable[[str], None]

_PUBLIC = {
    "text-classification": "rotten-tomatoes",
    "image-classification": "fashion-mnist",
    "causal-lm": "review-writing",
}
"""What stands in for data that the auditor must not see, by task."""

_MEMBERS = 8
"""Records of one client that membership is asked of, at most."""


def audit_run(
    output: Path, *, key: x25519.X25519PrivateKey | None = None, say: Say = print
) -> Audit:
    """Audits a finished run: its records, and a replay of it on public data.

    Args:
        output: the run directory.
        key: opens what it recorded; None leaves that closed, and says so.
        say: is told what is being done.

    Raises:
        RunError: if it is no finished run.
        DataError: if `key` is given and what was recorded does not open.
    """
    started = time.perf_counter()
    config, result = read_run(output)
    attacks_of(config)
    stage = set_stage(public(config))
    state = Path(config.run.state) if config.run.state else output
    say("reading this run's records")
    checks = check_records(config, result, stage.model.fingerprint, state)
    attacks, limits = _recorded(config, stage, output, state, key, say)
    say("replaying the run on public data")
    with tempfile.TemporaryDirectory() as folder:
        rounds = config.audit.rounds
        cases = observe(stage.config, Path(folder) / "run", rounds)
    attacks += run_attacks(stage, cases, "replay", say)
    say("trying to refute the claimed epsilon")
    trials, more = _examine(config, stage.model)
    return _audit(
        config,
        stage,
        checks=[*checks, *more],
        attacks=attacks,
        trials=trials,
        spent=_vouched(checks, result),
        limitations=[*limits, *_replay_limits(config, stage.config)],
        seconds=time.perf_counter() - started,
    )


def audit_scenario(config: RunConfig, output: Path, *, say: Say = print) -> Audit:
    """Runs a scenario on public data, recorded, and attacks every client.

    Args:
        config: of the scenario.
        output: new or empty; the run comes to lie in ``output / "run"``.
        say: is told what is being done.
    """
    started = time.perf_counter()
    if config.data.name is None:
        raise ConfigError(
            "[data] path: expected public data by name for an audit of a scenario, got "
            "a file; run the scenario, then audit its run directory."
        )
    attacks_of(config)
    stage = set_stage(config)
    say("running the scenario, recorded")
    cases = observe(config, output / "run")
    config, result = read_run(output / "run")
    folder = output / "run"
    checks = check_records(config, result, stage.model.fingerprint, folder)
    attacks = run_attacks(stage, cases, "replay", say)
    say("trying to refute the claimed epsilon")
    trials, more = _examine(config, stage.model)
    return _audit(
        config,
        stage,
        checks=[*checks, *more],
        attacks=attacks,
        trials=trials,
        spent=_vouched(checks, result),
        limitations=[],
        seconds=time.perf_counter() - started,
    )


def public(config: RunConfig) -> RunConfig:
    """Returns the configuration on public data: its own if they are, else a stand-in.

    Plan, method, training and compression stay as they are.
    """
    if config.data.name is not None:
        return config
    named = {
        "name": _PUBLIC[config.model.task],
        "path": None,
        "labels": None,
        "person": None,
        "group": None,
        "completion": None,
    }
    data = config.data.model_copy(update=named)
    # A partition by group would need the groups of the private data.
    dealt = {"name": "iid", "num_clients": config.partition.num_clients}
    partition = type(config.partition).model_validate(dealt)
    return config.model_copy(update={"data": data, "partition": partition})


def run_attacks(
    stage: Stage, cases: Sequence[Case], column: Column, say: Say
) -> list[AttackResult]:
    """Tries every attack that the configuration asks for; all of them by default."""
    results = []
    for name, attack in attacks_of(stage.config):
        if column == "this-run" and _makes_its_own(attack):
            continue  # what it looks at would be no part of this run
        say(f"attack: {name}")
        results.append(_run_attack(stage, name, attack, cases, column))
    return results


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
    stage: Stage, name: str, attack: Attack[Any], cases: Sequence[Case], column: Column
) -> AttackResult:
    """Gives an attack just what it needs, and judges it."""
    needs, facts = attack.needs, {}
    access = _granted(needs, cases)
    if needs.goal == "membership":
        cases = with_candidates(cases, members=_MEMBERS)
        if access == "final-model":
            cases = _with_references(stage, cases)
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
    form = release_form(stage.config)
    threat = replace(needs, access=access, release=form)
    seed = stage.config.run.seed
    result = judge(name, attack, cases, threat, seed=seed, column=column)
    return replace(result, settings={**result.settings, **facts})


def _granted(needs: ThreatModel, cases: Sequence[Case]) -> Access:
    """Returns what is really shown: an attack may look at all rounds that it is given.

    A replay that stopped early has no model to look at.
    """
    if needs.access == "final-model":
        is_over = any(case.observation.final is not None for case in cases)
        return "final-model" if is_over or needs.goal == "extract" else "update"
    several = any(len(case.observation.seen) > 1 for case in cases)
    return "updates" if several and needs.adversary not in "FGH" else needs.access


def _with_references(stage: Stage, cases: Sequence[Case]) -> list[Case]:
    """Gives all the same reference models, and the released one alone to attack.

    Where none can be trained, such as with too few public records, the attack says that
    it has none.
    """
    knowledge = cases[0].observation.knowledge
    with contextlib.suppress(ValueError):
        knowledge = with_references(knowledge, len(stage.decoys.label_names))
    return [
        replace(case, observation=_of_model(case.observation, knowledge))
        for case in cases
    ]


def _of_model(observation: Observation, knowledge: Knowledge) -> Observation:
    return Observation(
        knowledge, final=observation.final, candidates=observation.candidates
    )


def release_form(config: RunConfig) -> ReleaseForm:
    """Returns what an update has gone through before it is seen."""
    noised, dense = config.is_dp_sgd, config.compression.name == "dense"
    if noised:
        return "noised" if dense else "noised-compressed"
    return "raw" if dense else "compressed"


def _recorded(
    config: RunConfig,
    stage: Stage,
    output: Path,
    state: Path,
    key: x25519.X25519PrivateKey | None,
    say: Say,
) -> tuple[list[AttackResult], list[str]]:
    """Attacks what the run itself kept, where its data are public and it is opened."""
    if key is None:
        if not (output / FOLDER).is_dir():
            return [], ["This run kept no observations; none of it was attacked."]
        return [], ["What this run kept was not opened: no auditor's key was given."]
    records = read_records(output, config.run.id or "", key)
    if not _is_known(config, state):
        return [], [
            "What this run kept opens, and was not attacked: without the clients' data "
            "nobody can say whether a guess is right."
        ]
    final = load_file(output / "model" / "adapter.safetensors")
    say("attacking what this run kept")
    attacks = run_attacks(stage, cases_of(stage, records, final), "this-run", say)
    return attacks, _unread(config, stage, records)


def _is_known(config: RunConfig, state: Path) -> bool:
    """Whether the clients' records are the public ones that the scenario deals out.

    Their ledgers say so: a simulated client's is named by the deal.
    """
    if config.data.name is None:
        return False
    held, dealt = data_sources(state), read_dealt(config, None).parts
    return bool(held) and set(held) <= set(dealt)


def _unread(config: RunConfig, stage: Stage, records: Records) -> list[str]:
    seen = seen_by_client(records, config, stage.model)
    came = sum(bool(answer.payload) for answer in records.answers)
    lost = came - sum(len(parts) for parts in seen.values())
    return [f"{lost} answers that this run kept are no updates."] if lost else []


def _vouched(checks: Sequence[Check], result: dict[str, Any]) -> float | None:
    """Returns the spent epsilon that a result states, if ledgers are there to say so.

    None where they are not: then the whole plan counts as spent.
    """
    if not any(check.check == "spent epsilon" for check in checks):
        return None
    stated: float = result["privacy"]["spent_epsilon"]
    return stated


def _replay_limits(config: RunConfig, replayed: RunConfig) -> list[str]:
    limits = []
    if config.audit.rounds < config.run.rounds:
        limits.append(
            f"The replay stopped after {config.audit.rounds} of {config.run.rounds} "
            "rounds; an adversary who sees more of them learns more."
        )
    if replayed is not config:
        limits.append(
            f"The replay's data are {replayed.data.name}, which stand in for the run's "
            "own; other data may leak more or less."
        )
    return limits


def _examine(config: RunConfig, model: TaskModel) -> tuple[list[DpTrial], list[Check]]:
    seconds, seed = config.audit.dp_seconds, config.run.seed
    return examine(config, model, seconds=seconds, seed=seed)


def _audit(
    config: RunConfig,
    stage: Stage,
    *,
    checks: list[Check],
    attacks: list[AttackResult],
    trials: list[DpTrial],
    spent: float | None,
    limitations: list[str],
    seconds: float,
) -> Audit:
    return Audit(
        run=config.run.id or "",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config.model_dump(mode="json"),
        config_hash=config.hash,
        system=system_of(config, stage.model),
        federation=federation_of(config),
        release=release_of(config),
        claim=claim_of(config, spent),
        checks=tuple(checks),
        attacks=tuple(attacks),
        dp_trials=tuple(trials),
        rank_budget=tuple(rank_budget(stage.model, config)),
        surface=(),
        limitations=(
            *limitations,
            *(LIMITATIONS if config.is_private else ()),
            *_untried(attacks),
        ),
        provenance={
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
            f"{'CUDA' if torch.cuda.is_available() else 'no GPU'}",
            "seed": config.run.seed,
            "decoys": len(stage.decoys),
            "seconds": round(seconds, 1),
        },
    )


def _untried(attacks: Sequence[AttackResult]) -> list[str]:
    """Says which attacks the report does not speak of, and why."""
    tried = {result.attack for result in attacks}
    left_out = [name for name in ATTACKS if name not in tried]
    limits = [f"{r.attack}: not tried, {r.misfit}." for r in attacks if r.misfit]
    if left_out:
        limits.append(f"Not asked for: {', '.join(left_out)}.")
    return limits
