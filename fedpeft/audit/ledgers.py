"""What clients' ledgers show of a run: whole chains, and every answer charged."""

import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedpeft.audit.results import Check
from fedpeft.audit.weakening import compare
from fedpeft.config import RunConfig
from fedpeft.errors import LedgerError, RunError
from fedpeft.privacy import (
    ENROLMENT,
    SEEDED,
    Plan,
    data_sources,
    epsilon,
    open_ledger,
)
from fedpeft.privacy.ledger import Entry, ledger_as_it_stands

MOST_BYTES = 1 << 30
"""Of all ledgers of a run together; an entry has less than 1 KiB."""

Head = tuple[int, str]
"""Length and newest hash of a ledger, as its client has told the server."""

_FILES = (("ledger", "*.jsonl"), ("heads", "*.json"))
_ENTRIES = TypeAdapter(list[Entry])
_CHARGED = "every answer is charged"


def check_ledgers(
    config: RunConfig,
    plan: Plan,
    result: dict[str, Any],
    fingerprint: str,
    state: Path,
    told: Sequence[Head] | None = None,
) -> list[Check]:
    """Compares ledgers with what their run promised; nothing in `state` is changed.

    Args:
        config: of the run, resolved.
        plan: of that configuration.
        result: the run's ``result.json``.
        fingerprint: of the backbone.
        state: ``ledger/NAME.jsonl`` and ``heads/NAME.json``, a pair a client.
        told: where clients handed their ledgers over: the head of each, as the server
            last heard of it. None where all ledgers of the run must lie in `state`.

    Raises:
        RunError: for what is no ledger's file, or more than :data:`MOST_BYTES`.
    """
    sources = data_sources(state)
    if not sources:
        detail = "the clients' ledgers are not at hand: each client verifies its own"
        return [Check("ledgers", "unknown", detail, falsifies=True)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        _copy(state, copy)
        # As they stand, before anything mends them: what lacks an entry now lacks it.
        ledgers = [_entries(copy, source) for source in sources]
        # A client that was never asked may have a ledger too, of other runs.
        own = [each for each in ledgers if _of_run(each, config.run.id)]
        is_whole = told is None or len(own) >= len(told)
        strange = config.partition.num_clients - len(told or ())
        checks = [] if told is None else [_heads(ledgers, told, is_whole, strange)]
        if is_whole:
            checks.append(_charged(ledgers, config, plan, result))
            checks.append(_spent(ledgers, config.run.id, plan, result))
        else:
            detail = "fewer ledgers are at hand than clients have answered"
            checks.append(Check(_CHARGED, "unknown", detail, falsifies=True))
        for source in sources:
            released = any((state / "outbox" / source).glob("*"))
            checks.append(_ledger(copy, source, released, plan, config, fingerprint))
    return checks


def worst_epsilon(state: Path, delta: float) -> float:
    """Returns the epsilon of the worst ledger at hand, all its runs together.

    0 where no ledger is; ``inf`` where one cannot be accounted.

    Args:
        state: as for :func:`check_ledgers`.
        delta: at which epsilon is looked at.

    Raises:
        RunError: as :func:`check_ledgers`.
    """
    with tempfile.TemporaryDirectory() as folder:
        _copy(state, Path(folder))
        ledgers = [_entries(Path(folder), source) for source in data_sources(state)]
    histories = ([entry.composition for entry in ledger] for ledger in ledgers)
    try:
        return max((epsilon(each, delta) for each in histories), default=0.0)
    except ValueError:
        return math.inf


def _copy(state: Path, folder: Path) -> None:
    """Copies what ledgers are verified by: files alone, and no more than fits."""
    left = MOST_BYTES
    for part, pattern in _FILES:
        (folder / part).mkdir()
        for path in (state / part).glob(pattern):
            if path.is_symlink() or not path.is_file():
                raise RunError(
                    f"Expected a file at {path}, got a link or something else: put the "
                    "client's own file there."
                )
            left -= path.stat().st_size
            if left < 0:
                raise RunError(
                    f"Expected at most {MOST_BYTES >> 20} MiB of ledgers and heads in "
                    f"{state}, got more: these are no ledgers."
                )
            shutil.copyfile(path, folder / part / path.name)


def _entries(state: Path, source: str) -> list[Entry]:
    """Reads a ledger whose chain, without a key, anybody could have made."""
    try:
        entries = ledger_as_it_stands(state, source).entries
        fields = json.dumps([asdict(entry) for entry in entries])
        _ENTRIES.validate_json(fields, strict=True)
        for entry in entries:
            _ = entry.composition  # refuses noise, rates and steps that none has
    except (RecursionError, ValueError):
        raise RunError(
            f"Expected releases in the ledger {source}.jsonl, got an entry that no "
            "client writes: ask the client for its file again."
        ) from None
    return entries


def _of_run(entries: Sequence[Entry], run: str | None) -> list[Entry]:
    return [entry for entry in entries if entry.run == run]


def _heads(
    ledgers: Sequence[Sequence[Entry]],
    told: Sequence[Head],
    is_whole: bool,
    strange: int,
) -> Check:
    """Every ledger that the server was told of is here, and as long as it was.

    One that is not may be missing, unless the run's ledgers `is_whole`. But a ledger
    without any head that the server was told of must be of one of the `strange` clients
    that it never heard of: more such ledgers than such clients, and one was shortened
    or edited.
    """
    what = "ledgers that the server was told of"
    known = [set(enumerate((entry.hash for entry in each), 1)) for each in ledgers]
    if set[Head]().union(*known).issuperset(told):
        return Check(what, "ok", "all are at hand, none shorter", falsifies=True)
    detail = "not all are at hand, or one is not what the server was told of"
    strangers = sum(heads.isdisjoint(told) for heads in known)
    proof = is_whole or strangers > strange
    return Check(what, "failed" if proof else "unknown", detail, falsifies=True)


def _charged(
    ledgers: Sequence[Sequence[Entry]],
    config: RunConfig,
    plan: Plan,
    result: dict[str, Any],
) -> Check:
    """Every answer that counted stands in a ledger of its own, round by round."""
    charged = Counter(
        server_round
        for ledger in ledgers
        for server_round in {entry.round for entry in _of_run(ledger, config.run.id)}
    )
    expected = _answers(config, plan, result)
    short = [n for n, count in expected.items() if charged[n] < count]
    if short:
        n = short[0]
        detail = f"round {n}: at least {expected[n]} answers counted, fewer are charged"
        return Check(_CHARGED, "failed", detail, falsifies=True)
    detail = f"{sum(expected.values())} answers that counted, each in a ledger"
    if plan.is_secret:
        detail = f"{config.partition.num_clients} clients, each for the whole run"
    elif not plan.is_dp_sgd:
        detail = f"at least {detail}; how many more is a secret of the server's"
    return Check(_CHARGED, "ok", detail, falsifies=True)


def _answers(config: RunConfig, plan: Plan, result: dict[str, Any]) -> dict[int, int]:
    """Returns for each round how many answers counted, or how many must have.

    A round with fewer than its share of answers ends the run. Where cohorts are secret
    every client is charged before the first round, and by no other.
    """
    if plan.is_secret:
        return {ENROLMENT: config.partition.num_clients}
    cohort, rounds = config.cohort, range(1, config.run.rounds + 1)
    needed = math.ceil(cohort.min_reply_share * cohort.size - 1e-9)
    stated = {record["round"]: record["replies"] or 0 for record in result["rounds"]}
    return {n: max(needed, stated.get(n, 0)) for n in rounds}


def _spent(
    ledgers: Sequence[Sequence[Entry]],
    run: str | None,
    plan: Plan,
    result: dict[str, Any],
) -> Check:
    """The epsilon that the result states, worked out anew from entries."""
    what, privacy = "spent epsilon", result["privacy"]
    alone = privacy.get("spent_over") == "this run"
    histories = [
        [entry.composition for entry in _until(ledger, run, alone)]
        for ledger in ledgers
    ]
    try:
        worst = max(epsilon(history, plan.target_delta) for history in histories)
    except ValueError as error:
        return Check(what, "failed", f"cannot be worked out: {error}", falsifies=True)
    stated = privacy["spent_epsilon"]
    holds = stated >= worst * (1 - 1e-6)
    detail = f"{worst:.4f} by the entries of the worst ledger, {stated:.4f} stated"
    if holds and not plan.is_dp_sgd:  # less would tell who answered
        detail = f"no ledger shows more than the {stated:.4f} stated"
    return Check(what, "ok" if holds else "failed", detail, falsifies=True)


def _until(entries: Sequence[Entry], run: str | None, alone: bool) -> list[Entry]:
    """Returns what a ledger held when the run ended: later runs are not its own."""
    last = max((n for n, e in enumerate(entries, 1) if e.run == run), default=0)
    return _of_run(entries[:last], run) if alone else list(entries[:last])


def _ledger(
    state: Path,
    source: str,
    released: bool,
    plan: Plan,
    config: RunConfig,
    fingerprint: str,
) -> Check:
    """A ledger is whole, and its releases of this run are the plan's."""
    name = f"ledger of {source}"
    try:
        ledger = open_ledger(state, source, expected=released)
    except LedgerError as error:
        detail = str(error).replace(f"{state}/", "")
        return Check(name, "failed", detail, falsifies=True)
    entries = _of_run(ledger.entries, config.run.id)
    seeded = any(entry.mechanism == SEEDED for entry in entries)
    if seeded and config.privacy.noise != "seeded":
        detail = "protects less: releases of this run have seeded noise, not secure"
        return Check(name, "failed", detail, falsifies=True)
    good = f"{len(entries)} releases of this run, {len(ledger.entries)} in all"
    if not plan.is_dp_sgd:  # how many would tell how often it was drawn
        good = "whole, and the releases of this run are the plan's"
    good += ", with seeded noise" if seeded else ""
    failed = [
        check
        for check in _compared(name, entries, plan, fingerprint, good)
        if check.status == "failed"
    ]
    worst = max(failed, key=lambda check: check.falsifies, default=None)
    return worst or Check(name, "ok", good, falsifies=True)


def _compared(
    name: str, entries: Sequence[Entry], plan: Plan, fingerprint: str, good: str
) -> list[Check]:
    steps = sum(entry.steps for entry in entries)
    cap = plan.composition(plan.max_participations).steps
    expected = {
        "unit": plan.unit,
        "relation": plan.relation,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_rate": plan.sampling_rate,
        "steps": min(steps, cap),
        "clipping_norm": plan.clipping_norm,
        "backbone": fingerprint,
        "plan_hash": plan.hash,
    }
    return [
        compare(name, {**asdict(entry), "steps": steps}, expected, good)
        for entry in entries
    ]
