"""What a run says of itself: its claim, its parts, and whether its records agree."""

import json
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from fedpeft.audit.results import Check, Claim
from fedpeft.audit.trials import ledger_as_it_stands
from fedpeft.config import RunConfig
from fedpeft.errors import LedgerError, RunError
from fedpeft.model import TaskModel
from fedpeft.privacy import (
    SEEDED,
    Plan,
    data_sources,
    epsilon,
    make_plan,
    reconstruction_bound,
    verify,
)
from fedpeft.privacy.ledger import Entry
from fedpeft.wording import one_line

CANDIDATES = (2, 10, 100, 1000)
"""Of how many records an adversary must pick the right one, for the claim's words."""

_PARTS = ("ledger", "heads", "outbox")
"""Of a client's state: what its ledger is verified by."""

_VERSIONS = ("fedpeft", "torch", "transformers", "peft", "dp-accounting")


class _Round(BaseModel):
    replies: int | None


class _Privacy(BaseModel):
    unit: str
    planned_epsilon: FiniteFloat | None = None
    spent_epsilon: FiniteFloat | None = None


class _Result(BaseModel):
    """What is read of a ``result.json``; there may be more."""

    config_hash: str
    rounds: list[_Round]
    privacy: _Privacy


def read_run(output: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Returns a finished run's configuration and its ``result.json``.

    Raises:
        RunError: if there is no run, or it has not ended.
    """
    config, result = output / "config.toml", output / "result.json"
    if not config.exists():
        raise RunError(f"Expected a run directory, found no config.toml in {output}.")
    if not result.exists():
        raise RunError(
            f"Expected a finished run, found no result.json in {output}: go on with it "
            "first (`simulate` with --resume)."
        )
    try:
        content = json.loads(result.read_bytes())
        _Result.model_validate(content)
    except ValidationError as error:
        raise RunError(f"{result}: {one_line(error, _Result)}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"Expected JSON in {result}: {reason}.") from None
    return RunConfig.from_file(config), dict(content)


def claim_of(config: RunConfig, spent_epsilon: float | None = None) -> Claim | None:
    """Returns the guarantee of a configuration, or of its run; None without privacy.

    Args:
        config: of the run.
        spent_epsilon: as its ledgers vouch for it; None takes the whole plan's.
    """
    plan = make_plan(config)
    if plan is None:
        return None
    composition = plan.composition(plan.max_participations)
    return Claim(
        unit=plan.unit,
        relation=plan.relation,
        target_epsilon=plan.target_epsilon,
        planned_epsilon=plan.planned_epsilon,
        spent_epsilon=plan.planned_epsilon if spent_epsilon is None else spent_epsilon,
        delta=plan.target_delta,
        noise_multiplier=plan.noise_multiplier,
        sampling_rate=plan.sampling_rate,
        steps=plan.local_steps,
        participations=plan.max_participations,
        clipping_norm=plan.clipping_norm,
        accountant=f"privacy loss distributions, dp-accounting "
        f"{version('dp-accounting')}",
        noise=config.privacy.noise,
        holds_against="everybody" if plan.is_dp_sgd else "everybody but the server",
        largest_success={
            number: reconstruction_bound(composition, 1 / number)
            for number in CANDIDATES
        },
    )


def system_of(config: RunConfig, model: TaskModel) -> dict[str, object]:
    """Returns what was fine-tuned, with which method and versions."""
    trainable = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    return {
        "backbone": config.model.backbone,
        "fingerprint": model.fingerprint,
        "task": config.model.task,
        "method": config.peft.name,
        "options": config.peft.options,
        "trainable_parameters": trainable,
        "backbone_parameters": model.num_backbone_parameters,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _VERSIONS},
        },
    }


def federation_of(config: RunConfig) -> dict[str, object]:
    """Returns who trains with whom, and how."""
    return {
        "clients": config.partition.num_clients,
        "cohort": config.cohort.size,
        "rounds": config.run.rounds,
        "optimizer": config.training.optimizer,
        "learning_rate": config.training.learning_rate,
        "batch_size": config.training.batch_size,
        "local_epochs": config.training.local_epochs,
        "data": config.data.name or "a file of the run's own",
    }


def release_of(config: RunConfig) -> dict[str, object]:
    """Returns what happens to an update before anybody sees it."""
    at_client = config.is_dp_sgd
    order = ["clip", "noise", "train", "compress"] if at_client else ["compress"]
    if config.privacy.unit == "client":
        order = ["compress", "decompress", "clip at the server", "noise at the server"]
    return {
        "order": order,
        "clipping_norm": config.privacy.clipping_norm if config.is_private else None,
        "compression": config.compression.name,
        "compression_options": config.compression.options,
        "error_feedback": config.compression.error_feedback,
        "precision": config.training.precision,
        "noise": config.privacy.noise if config.is_private else None,
    }


def check_records(
    config: RunConfig, result: dict[str, Any], fingerprint: str, state: Path
) -> list[Check]:
    """Compares what a run has written with what its configuration implies.

    Args:
        config: of the run, resolved.
        result: its ``result.json``.
        fingerprint: of the backbone, computed here.
        state: where the clients' ledgers lie, if they are at hand.
    """
    plan = make_plan(config)
    checks = [_same("configuration", config.hash, result["config_hash"], False)]
    if plan is None:
        return checks
    checks.append(_noise(config))
    checks.append(_plan(plan, result))
    sources = data_sources(state)
    if not sources:
        detail = "the clients' ledgers are not at hand: each client verifies its own"
        return [*checks, Check("ledgers", "unknown", detail, falsifies=True)]
    # As they stand, before anything mends them: what lacks an entry now lacks it.
    charged = [ledger_as_it_stands(state, source).entries for source in sources]
    checks.append(_charged(charged, config.run.id, result))
    checks.append(_spent(charged, plan, result))
    # Verifying brings up what a crash left behind; evidence stays as it was found.
    with tempfile.TemporaryDirectory() as folder:
        for part in _PARTS:
            if (state / part).is_dir():
                shutil.copytree(state / part, Path(folder) / part)
        for source in sources:
            found = _ledger(Path(folder), source, plan, config.run.id, fingerprint)
            checks.append(found)
    return checks


def _same(what: str, expected: str, got: str, falsifies: bool) -> Check:
    if expected == got:
        return Check(what, "ok", f"hash {got[:16]}, as computed anew", falsifies)
    detail = f"expected hash {expected[:16]}, found {got[:16]}"
    return Check(what, "failed", detail, falsifies)


def _noise(config: RunConfig) -> Check:
    if config.privacy.noise == "secure":
        return Check("noise", "ok", "from a cryptographic generator")
    detail = (
        "expected secure noise, found seeded: whoever knows the seed can remove it, "
        "and the guarantee holds against nobody who does"
    )
    return Check("noise", "failed", detail)


def _plan(plan: Plan, result: dict[str, Any]) -> Check:
    """The plan is a function of public constants: it must come out the same here."""
    stated = result["privacy"]
    public = asdict(plan)
    wrong = [
        name
        for name, value in public.items()
        if name != "planned_epsilon" and stated.get(name) != value
    ]
    if stated.get("planned_epsilon", 0.0) < plan.planned_epsilon * (1 - 1e-6):
        wrong.append("planned_epsilon")
    if not wrong:
        detail = f"planned epsilon {plan.planned_epsilon:.4f}, as computed anew"
        return Check("plan", "ok", detail, falsifies=True)
    detail = f"expected the plan computed anew, found another {', '.join(wrong)}"
    return Check("plan", "failed", detail, falsifies=True)


def _charged(
    ledgers: Sequence[Sequence[Entry]], run: str | None, result: dict[str, Any]
) -> Check:
    """Every answer that counted stands in a ledger of its own, round by round."""
    what = "every answer is charged"
    replies = [record["replies"] for record in result["rounds"]]
    if None in replies:
        return Check(what, "unknown", "how many answered is a secret of the server's")
    charged = Counter(
        server_round
        for ledger in ledgers
        for server_round in {entry.round for entry in ledger if entry.run == run}
    )
    short = [n for n, count in enumerate(replies, 1) if charged[n] < count]
    if not short:
        detail = f"{sum(replies)} answers that counted, each in a ledger of its own"
        return Check(what, "ok", detail, falsifies=True)
    detail = (
        f"round {short[0]}: {replies[short[0] - 1]} answers counted, "
        f"{charged[short[0]]} stand in ledgers"
    )
    return Check(what, "failed", detail, falsifies=True)


def _spent(
    ledgers: Sequence[Sequence[Entry]], plan: Plan, result: dict[str, Any]
) -> Check:
    """The epsilon that the result states, worked out anew from every entry."""
    histories = [[entry.composition for entry in ledger] for ledger in ledgers]
    worst = max(epsilon(history, plan.target_delta) for history in histories)
    stated = result["privacy"]["spent_epsilon"]
    detail = f"{worst:.4f} by all entries of the worst ledger, {stated:.4f} stated"
    holds = stated >= worst * (1 - 1e-9)
    return Check("spent epsilon", "ok" if holds else "failed", detail, falsifies=True)


def _ledger(
    state: Path, source: str, plan: Plan, run: str | None, fingerprint: str
) -> Check:
    name = f"ledger of {source}"
    try:
        ledger = verify(state, source)
    except LedgerError as error:
        return Check(name, "failed", str(error), falsifies=True)
    entries = [entry for entry in ledger.entries if entry.run == run]
    if any(entry.plan_hash != plan.hash for entry in entries):
        detail = "expected releases of this plan alone, found others in this run"
        return Check(name, "failed", detail, falsifies=True)
    if any(entry.backbone != fingerprint for entry in entries):
        detail = "expected releases of this backbone alone, found others in this run"
        return Check(name, "failed", detail)
    seeded = any(entry.mechanism == SEEDED for entry in entries)
    detail = f"{len(entries)} releases of this run, {len(ledger.entries)} in all"
    return Check(name, "ok", detail + (", with seeded noise" if seeded else ""))
