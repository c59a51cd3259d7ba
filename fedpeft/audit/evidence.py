"""What a run says of itself: its claim, its parts, and whether its records agree."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    FiniteFloat,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedpeft.audit.ledgers import Head, check_ledgers
from fedpeft.audit.results import Check, Claim
from fedpeft.audit.weakening import compare
from fedpeft.config import RunConfig
from fedpeft.errors import RunError
from fedpeft.model import TaskModel
from fedpeft.privacy import Plan, make_plan, reconstruction_bound
from fedpeft.tensors import Tensors
from fedpeft.wording import one_line

CANDIDATES = (2, 10, 100, 1000)
"""Of how many records an adversary must pick the right one, for the claim's words."""

_VERSIONS = ("fedpeft", "torch", "transformers", "peft", "dp-accounting")


class _Round(BaseModel, strict=True):
    round: int
    replies: NonNegativeInt | None


class _Privacy(BaseModel, strict=True):
    unit: str


class _Spent(BaseModel, strict=True):
    planned_epsilon: FiniteFloat
    spent_epsilon: FiniteFloat


class _Result(BaseModel, strict=True):
    """What is read of a ``result.json``; there may be more."""

    run: str
    config_hash: str
    rounds: list[_Round]
    privacy: _Privacy


def read_run(output: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Returns a finished run's configuration and its ``result.json``.

    **Guarantees**: of the latter, all that an audit reads is there and of its type.

    Raises:
        RunError: if there is no run, it has not ended, or what it wrote is of another
            shape.
    """
    path, file = output / "config.toml", output / "result.json"
    if not path.is_file():
        raise RunError(f"Expected a run directory, found no config.toml in {output}.")
    if not file.is_file():
        raise RunError(
            f"Expected a finished run, found no result.json in {output}: go on with it "
            "first (`simulate` with --resume)."
        )
    config = RunConfig.from_file(path)
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"Expected JSON in {file}: {reason}.") from None
    _check(_Result, content, file)
    if config.is_private:
        _check(_Spent, content["privacy"], file, "privacy")
        _check(Plan, content["privacy"], file, "privacy")
    return config, dict(content)


def _check(kind: Any, content: object, file: Path, section: str = "") -> None:
    """Refuses content of another shape, its numbers as text among it."""
    try:
        TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        line = one_line(error, kind, section)
        raise RunError(f"{file}: {line}") from None


def read_released(output: Path, like: Tensors) -> Tensors:
    """Returns the trainable state of the model that a run released.

    Args:
        output: the run directory.
        like: names and shapes, as the run's own model has them.

    Raises:
        RunError: if the file is none, or of another model.
    """
    path = output / "model" / "adapter.safetensors"
    try:
        found = load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"Expected a model in {path}: {error}.") from None
    for name, tensor in like.items():
        if name not in found or found[name].shape != tensor.shape:
            raise RunError(
                f"Expected {name} of shape {tuple(tensor.shape)} in {path}, found none "
                "such: it is no model, or another configuration's."
            )
        if not found[name].isfinite().all():
            raise RunError(f"Expected finite values of {name} in {path}, found others.")
    return {name: found[name].to(like[name].dtype) for name in like}


def claim_of(config: RunConfig, spent_epsilon: float | None = None) -> Claim | None:
    """Returns the guarantee of a configuration, or of its run; None without privacy.

    Args:
        config: of the run.
        spent_epsilon: by the worst client, over all its runs; None takes the plan's.
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
    config: RunConfig,
    result: dict[str, Any],
    fingerprint: str,
    state: Path,
    told: Sequence[Head] | None = None,
) -> list[Check]:
    """Compares what a run has written with what its configuration implies.

    Args:
        config: of the run, resolved.
        result: its ``result.json``.
        fingerprint: of the backbone, computed here.
        state: where the clients' ledgers lie, if they are at hand.
        told: where clients handed them over: what the server knows of each; None for
            a simulation, whose ledgers are all there.

    Raises:
        RunError: for ledgers that are none, see :func:`check_ledgers`.
    """
    plan = make_plan(config)
    checks = [_configuration(config, result)]
    if plan is None:
        return checks
    stated = TypeAdapter(Plan).validate_python(result["privacy"])
    good = f"planned epsilon {plan.planned_epsilon:.4f}, as computed anew"
    return [
        *checks,
        _noise(config),
        # A function of public constants: it must come out the same here.
        compare("plan", asdict(stated), asdict(plan), good),
        _rounds(config, plan, result),
        *check_ledgers(config, plan, result, fingerprint, state, told),
    ]


def _configuration(config: RunConfig, result: dict[str, Any]) -> Check:
    what, run = "configuration", result["run"]
    if run != config.run.id:
        detail = f"expected the result of run {config.run.id}, found that of {run}"
        return Check(what, "failed", detail)
    expected, found = config.hash[:16], result["config_hash"][:16]
    if expected != found:
        return Check(what, "failed", f"expected hash {expected}, found {found}")
    return Check(what, "ok", f"hash {found}, as computed anew")


def _noise(config: RunConfig) -> Check:
    if config.privacy.noise == "secure":
        return Check("noise", "ok", "from a cryptographic generator")
    detail = (
        "expected secure noise, found seeded: whoever knows the seed can remove it, "
        "and the guarantee holds against nobody who does"
    )
    return Check("noise", "failed", detail)


def _rounds(config: RunConfig, plan: Plan, result: dict[str, Any]) -> Check:
    """Each round has its record, with the answers that counted unless they are secret.

    Without it nobody can say that every answer was charged.
    """
    what, number = "record of every round", config.run.rounds
    found = [record["round"] for record in result["rounds"]]
    if found != [*range(1, number + 1)]:
        detail = f"expected rounds 1 to {number} in order, found {len(found)} records"
        return Check(what, "failed", detail, falsifies=True)
    silent = [r["round"] for r in result["rounds"] if r["replies"] is None]
    if silent and plan.is_dp_sgd:
        detail = f"round {silent[0]}: expected how many answers counted, found none"
        return Check(what, "failed", detail, falsifies=True)
    return Check(what, "ok", f"rounds 1 to {number}", falsifies=True)
