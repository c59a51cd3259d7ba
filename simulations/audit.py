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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric import x25519

from fedpeft.attacks import ATTACKS
from fedpeft.attacks.attack import Case
from fedpeft.attacks.rank_budget import rank_budget
from fedpeft.audit.document import without_folders
from fedpeft.audit.evidence import (
    check_records,
    claim_of,
    federation_of,
    read_run,
    release_of,
    system_of,
)
from fedpeft.audit.ledgers import worst_epsilon
from fedpeft.audit.results import AttackResult, Audit, Check, DpTrial
from fedpeft.audit.trials import LIMITATIONS, mislabelled
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.errors import ConfigError, FedpeftError, RunError
from fedpeft.privacy import make_plan
from server.checkpoint import load_checkpoint
from simulations.attacking import Say, attacks_aggregates, attacks_of, run_attacks
from simulations.canaries import examine
from simulations.observing import Stage, observe, set_stage
from simulations.recorded import attack_recorded
from simulations.replaying import public, replay_limits, with_settings

_FEWEST_CANARIES = 8

_NO_AGGREGATE = (
    "No attack was given what becomes of a round's updates together, which every "
    "participant sees: set [audit] aggregate = true."
)

_SHARED = (
    "The clients of a cohort share its aggregate and its noise: intervals of attacks "
    "on aggregates are of this audit's cohorts, and narrow for others."
)


def audit_run(
    output: Path,
    *,
    key: x25519.X25519PrivateKey | None = None,
    ledgers: Path | None = None,
    overrides: Sequence[str] = (),
    say: Say = print,
) -> Audit:
    """Audits a finished run: its records, and a replay of it on public data.

    Args:
        output: the run directory.
        key: opens what it recorded; None leaves that closed, and says so.
        ledgers: of a deployed run, as its clients handed them over: of each client
            ``STATE/ledger/SOURCE.jsonl`` and ``STATE/heads/SOURCE.json`` in folders of
            these names, under a name of its own. None takes those of a simulation.
        overrides: the auditor's ``audit.key=value``, in place of the run's own.
        say: is told what is being done.

    Raises:
        RunError: if it is no finished run.
        ConfigError: for an override that is none, or a run that cannot be replayed.
        DataError: if `key` is given and what was recorded does not open.
    """
    started = time.perf_counter()
    config, result = read_run(output)
    config = with_settings(config, overrides)
    attacks_of(config)
    stage = set_stage(public(config))
    state = Path(config.run.state) if config.run.state else output
    say("reading this run's records")
    told = None if ledgers is None else _told(output, result)
    fingerprint, held = stage.model.fingerprint, ledgers or state
    checks = check_records(config, result, fingerprint, held, told)
    attacks, limits = attack_recorded(config, stage, output, state, key, say)
    say("replaying the run on public data")
    with tempfile.TemporaryDirectory() as folder:
        cases = observe(stage.config, Path(folder) / "run", config.audit.rounds)
    return _audit(
        config,
        stage,
        cases,
        checks=checks,
        attacks=attacks,
        spent=spent_epsilon(config, result, checks, held),
        limitations=[*limits, *replay_limits(config, stage.config)],
        started=started,
        say=say,
    )


def audit_scenario(config: RunConfig, output: Path, *, say: Say = print) -> Audit:
    """Runs a scenario on public data, recorded, and attacks every client.

    Args:
        config: of the scenario.
        output: the run comes to lie in ``output / "run"``. If that holds one of this
            configuration already, another is run elsewhere and thrown away.
        say: is told what is being done.

    Raises:
        ConfigError: if the data are not public.
        RunError: if `output` holds a run of another configuration.
    """
    started = time.perf_counter()
    if config.data.name is None:
        raise ConfigError(
            "[data] path: expected public data by name for an audit of a scenario, got "
            "a file; run the scenario, then audit its run directory."
        )
    attacks_of(config)
    with _place(config, output / "run") as folder:
        stage = set_stage(config)
        say("running the scenario, recorded")
        cases = observe(config, folder)
        config, result = read_run(folder)
        checks = check_records(config, result, stage.model.fingerprint, folder)
        spent = spent_epsilon(config, result, checks, folder)
    return _audit(
        config,
        stage,
        cases,
        checks=checks,
        attacks=[],
        spent=spent,
        limitations=[],
        started=started,
        say=say,
    )


def spent_epsilon(
    config: RunConfig, result: dict[str, Any], checks: Sequence[Check], state: Path
) -> float | None:
    """Returns the worst client's epsilon over all its runs; None without privacy.

    The largest that is known: what the result states, and what the ledgers at hand
    hold. Where not all of them are at hand the whole plan counts as spent.

    Args:
        config: of the run.
        result: its ``result.json``.
        checks: of its records.
        state: where the clients' ledgers lie, if they are at hand.
    """
    plan = make_plan(config)
    if plan is None:
        return None
    stated: float = result["privacy"]["spent_epsilon"]
    known = max(stated, worst_epsilon(state, plan.target_delta))
    if any(check.check == "spent epsilon" for check in checks):
        return known
    return max(known, plan.planned_epsilon)


@contextlib.contextmanager
def _place(config: RunConfig, wanted: Path) -> Iterator[Path]:
    """Yields where a scenario is run: elsewhere for a while if it was run here."""
    kept = wanted / "config.toml"
    if not kept.exists():
        yield wanted
        return
    if RunConfig.from_file(kept).hash != config.hash:
        raise RunError(
            f"Expected a new directory, or one of this configuration, {wanted} is a "
            "run of another: choose another output directory."
        )
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def _told(output: Path, result: dict[str, Any]) -> list[tuple[int, str]]:
    """Returns the head of each client's ledger, as the server last heard of it."""
    folder = output / "checkpoint"
    try:
        told = load_checkpoint(folder, result["config_hash"]).acknowledged.values()
        return [(int(length), str(head)) for length, head in told]
    except FedpeftError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RunError(
            f"Expected a checkpoint in {folder}, got one that no server writes."
        ) from None


def _examine(config: RunConfig, stage: Stage) -> tuple[list[DpTrial], list[Check]]:
    seconds, seed = config.audit.dp_seconds, config.run.seed
    samples = _sample_canaries(stage) if config.is_private else None
    return examine(config, stage.model, seconds=seconds, seed=seed, samples=samples)


def _sample_canaries(stage: Stage) -> Encoded | None:
    """Returns public examples with wrong labels, if the data have any labels."""
    most = min(stage.config.audit.sample_canaries, len(stage.surrogate))
    if most < _FEWEST_CANARIES:
        return None
    examples = stage.model.task.encode(stage.surrogate.subset(range(most)))
    labels = stage.surrogate.label_names
    return mislabelled(examples, len(labels)) if labels else examples


def _audit(
    config: RunConfig,
    stage: Stage,
    cases: Sequence[Case],
    *,
    checks: list[Check],
    attacks: list[AttackResult],
    spent: float | None,
    limitations: list[str],
    started: float,
    say: Say,
) -> Audit:
    """Attacks what was replayed and the claim, and puts all of it together."""
    attacks = [*attacks, *run_attacks(stage, cases, "replay", say)]
    say("trying to refute the claimed epsilon")
    trials, more = _examine(config, stage)
    sections = without_folders(config)
    backbone = sections["model"]["backbone"]
    return Audit(
        run=config.run.id or "",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=sections,
        config_hash=config.hash,
        system={**system_of(config, stage.model), "backbone": backbone},
        federation=federation_of(config),
        release=release_of(config),
        claim=claim_of(config, spent),
        checks=(*checks, *more),
        attacks=tuple(attacks),
        dp_trials=tuple(trials),
        rank_budget=tuple(rank_budget(stage.model, config)),
        surface=(),
        limitations=(
            *limitations,
            *(LIMITATIONS if config.is_private else ()),
            _SHARED if attacks_aggregates(config) else _NO_AGGREGATE,
            *_untried(attacks),
        ),
        provenance={
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
            f"{'CUDA' if torch.cuda.is_available() else 'no GPU'}",
            "seed": config.run.seed,
            "decoys": len(stage.decoys),
            "seconds": round(time.perf_counter() - started, 1),
        },
    )


def _untried(attacks: Sequence[AttackResult]) -> list[str]:
    """Says which attacks the report does not speak of, and why."""
    tried = {result.attack for result in attacks}
    left_out = [name for name in ATTACKS if name not in tried]
    lacks: dict[tuple[str, str], str] = {}
    for result in attacks:
        if result.misfit:
            view = " on aggregates" if result.threat.access == "aggregate" else ""
            lacks.setdefault((result.attack, result.misfit), view)
    limits = [
        f"{name}{view}: not tried, {lack}." for (name, lack), view in lacks.items()
    ]
    if left_out:
        limits.append(f"Not asked for: {', '.join(left_out)}.")
    return limits
