"""``result.json``: the summary of a run, one schema for every runtime."""

import dataclasses
import platform
import resource
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.privacy import Plan, epsilon
from fedpeft.tensors import flatten
from server.checkpoint import Progress
from server.setup import Server

SCHEMA_VERSION = 1
_PACKAGES = (
    "fedpeft",
    "constriction",
    "dp-accounting",
    "flwr",
    "numpy",
    "peft",
    "torch",
    "transformers",
)


def build_result(
    server: Server,
    progress: Progress,
    *,
    seconds: float,
    spent: Callable[[], float] | None,
    memory: int,
) -> dict[str, Any]:
    """Returns the summary of a finished run.

    Args:
        server: as it ran.
        progress: after the last round.
        seconds: that the run took.
        spent: the worst client's epsilon, from the ledgers, if they can be read here.
        memory: peak bytes, summed over processes.
    """
    config = server.config
    shared = flatten(progress.trainable).numel()
    local = flatten(server.model.local_start).numel()
    return {
        "schema_version": SCHEMA_VERSION,
        "run": server.run,
        "config_hash": config.hash,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
        "task": config.model.task,
        "trainable_parameters": shared + local,
        "shared_parameters": shared,
        "backbone_parameters": server.model.num_backbone_parameters,
        "final": {
            "metric": server.model.task.metric,
            "value": progress.records[-1]["metric"],
            "others": progress.records[-1]["others"],
        },
        "rounds": progress.records,
        "threads": 1,
        "privacy": privacy_facts(config, server.plan, progress, spent),
        "communication": _communication(progress, server.hides_clients),
        "seconds": None if server.hides_clients else round(seconds, 1),
        "peak_memory_bytes": None if server.hides_clients else memory,
    }


def privacy_facts(
    config: RunConfig,
    plan: Plan | None,
    progress: Progress,
    spent: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Plan and worst client; a client that was asked counts as one that released."""
    if plan is None:
        return {"unit": "none", "relation": "none"}
    rounds = max(progress.asked.values(), default=0)
    if plan.is_secret:  # every round speaks of every client, in it or not
        rounds = progress.server_round
    price = epsilon([plan.composition(rounds)], plan.target_delta)
    spent_epsilon = spent() if spent else price
    if not plan.is_dp_sgd:  # whether a ledger shows less would tell who answered
        spent_epsilon = max(spent_epsilon, price)
    return {
        **dataclasses.asdict(plan),
        "holds_against": "everybody" if plan.is_dp_sgd else "everybody but the server",
        "spent_epsilon": spent_epsilon,
        "spent_over": "all runs in the ledgers" if spent else "this run",
        "accountant": "pld",
        "engine": config.privacy.engine,
        "noise": config.privacy.noise,
    }


def _communication(progress: Progress, hides_clients: bool) -> dict[str, Any]:
    """Sums the bytes; None where they would tell how many clients answered."""
    if hides_clients:
        keys = ("bytes_up", "bytes_down", "bytes_up_dense_fp32", "ratio")
        return dict.fromkeys((*keys, "entropy_bound_ratio"))
    replies = sum(record["replies"] for record in progress.records)
    up = sum(record["bytes_up"] for record in progress.records)
    entropy = sum(record["entropy_bytes"] for record in progress.records)
    dense = 4 * flatten(progress.trainable).numel() * replies
    return {
        "bytes_up": up,
        "bytes_down": sum(record["bytes_down"] for record in progress.records),
        "bytes_up_dense_fp32": dense,
        "ratio": dense / up,
        "entropy_bound_ratio": up / entropy if entropy else None,
    }


def peak_memory_bytes() -> int:
    """Returns the largest resident set that this process had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
