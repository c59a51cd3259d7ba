"""The round loop: ask a cohort, aggregate, apply, evaluate, checkpoint.

It is ours because a private run must stop where Flower's own loop carries on: when too
few clients answer, the run ends with the reason and can be resumed.
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from client.messages import TrainReply
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig
from fedpeft.durable import append_durably, write_atomically
from fedpeft.errors import RunError
from fedpeft.interfaces import Update
from fedpeft.tensors import Tensors, add, flatten, scale
from server.checkpoint import Progress, save_checkpoint
from server.cohort import rotation
from server.exchange import (
    SILENT,
    Tally,
    decode_updates,
    enrol,
    exchange,
    request_to,
)
from server.judging import judge
from server.setup import Server

logger = logging.getLogger(__name__)


def run_rounds(grid: Grid, server: Server, progress: Progress) -> Progress:
    """Runs all rounds after `progress`; each ends with a checkpoint and an event line.

    Asked to stop, it stops before the next round.

    Raises:
        RunError: if too small a share of a cohort answers.
    """
    server.runtime.watch(progress)
    if server.plan is not None and server.plan.is_secret and not progress.server_round:
        enrol(grid, server, progress)
    for server_round in range(progress.server_round + 1, server.config.run.rounds + 1):
        if server.runtime.should_stop():
            break
        record = _run_round(grid, server, progress, server_round)
        progress.records.append(record)
        save_checkpoint(server.output / "checkpoint", progress, server.config.hash)
        line = json.dumps(record).encode() + b"\n"
        append_durably(server.output / "events.jsonl", line)
        _log(server, record)
        server.runtime.watch(progress)
    return progress


def restore_events(output: Path, progress: Progress) -> None:
    """Rewrites ``events.jsonl`` to what the checkpoint knows."""
    lines = [json.dumps(record).encode() + b"\n" for record in progress.records]
    write_atomically(output / "events.jsonl", b"".join(lines))


def final_state(progress: Progress, config: RunConfig) -> Tensors:
    """Returns the trainable state of the final model: the mean of the last rounds'."""
    return scale(progress.tail, 1 / min(config.run.average_last, config.run.rounds))


def _run_round(
    grid: Grid, server: Server, progress: Progress, server_round: int
) -> dict[str, Any]:
    """Advances `progress` by one round and returns the round's record."""
    started = time.perf_counter()
    late = server.runtime.late()
    cohort = _cohort(server, progress, server_round)
    state = COMPRESSORS["dense"]().compress(progress.trainable, torch.Generator())
    requests = {
        client: request_to(server, progress, server_round, client, state.to_bytes())
        for client in cohort
    }
    asked = set(cohort)
    if not server.hides_clients:
        asked = server.standing.ask(server_round, cohort)
    for client in asked:
        progress.asked[client] = progress.asked.get(client, 0) + 1
    replies = exchange(grid, server, requests)
    _record(server, server_round, state.to_bytes(), replies)
    tally = Tally(dict.fromkeys(cohort, SILENT))
    updates = decode_updates(server, progress, replies, tally)
    try:
        _advance(server, progress, server_round, updates, tally)
    finally:
        if not server.hides_clients:
            server.standing.note(tally.outcomes, server.runtime)
    metrics = _metrics(server, progress)
    late = server.runtime.late() - late
    facts: dict[str, Any] = {
        "cohort_size": len(cohort),
        "replies": tally.replies,
        "failures": len(cohort) - tally.replies,
        "codes": {**tally.codes, **({"late": late} if late else {})},
        "bytes_up": tally.bytes_up,
        "bytes_down": sum(len(request.state) for request in requests.values()),
        "entropy_bytes": round(tally.entropy_bits / 8),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if server.hides_clients:
        server.secrets.note({"round": server_round, **facts})
        facts = dict.fromkeys(facts)
    metric = metrics.pop(server.model.task.metric, None)
    return {"round": server_round, **facts, "metric": metric, "others": metrics}


def _record(
    server: Server, server_round: int, state: bytes, replies: dict[int, TrainReply]
) -> None:
    """Keeps for the auditor what went out and what came, before anything is done."""
    if server.recorder is None:
        return
    server.recorder.state(server_round, state)
    for client, reply in replies.items():
        header = dict(vars(reply))
        payload = header.pop("payload")
        server.recorder.answer(server_round, client, header, payload)


def _cohort(server: Server, progress: Progress, server_round: int) -> list[int]:
    """Returns whom to ask.

    In a run that hides nobody, clients that are busy, set aside or at their cap are
    passed over, and the next in the rotation step in where too few would be left.
    """
    cohort, num_clients = server.config.cohort, server.config.partition.num_clients
    if cohort.sampling != "rotation":
        source = server.randomness(server_round)
        return server.secrets.cohort(server.config, server_round, source)
    without: set[int] = set()
    if not server.hides_clients:
        without = server.standing.passed_over(server_round, server.runtime)
        if server.plan is not None:
            cap = server.plan.max_participations
            without |= {c for c, asked in progress.asked.items() if asked >= cap}
    at_least = math.ceil(cohort.min_reply_share * cohort.size - 1e-9)
    return rotation(server_round, cohort.size, num_clients, without, at_least)


def _advance(
    server: Server,
    progress: Progress,
    server_round: int,
    updates: Iterator[Update],
    tally: Tally,
) -> None:
    """Aggregates and applies the round, or refuses it and leaves `progress`.

    An empty cohort, which a Poisson draw may give, is a round of noise alone.

    Raises:
        RunError: if too small a share of the cohort answered, or the result is no
            number any more.
    """
    run, cohort = server.config.run, server.config.cohort
    # A rotation that passes clients over may find fewer than were planned.
    planned = cohort.size if cohort.sampling == "rotation" else len(tally.outcomes)
    needed = cohort.min_reply_share * planned
    first = next(updates, None)
    if first is None and planned:
        raise RunError(_too_few(server, server_round, tally, needed))
    stream = updates if first is None else chain([first], updates)
    step, aggregator = server.aggregator.aggregate(stream, progress.aggregator)
    if tally.replies < needed:
        raise RunError(_too_few(server, server_round, tally, needed))
    trainable = add(progress.trainable, step)
    if not flatten(trainable).isfinite().all():
        raise RunError(
            f"Round {server_round}: expected finite parameters, got others: an update "
            "is absurdly large. The round before is on disk; start a new run without "
            "that client."
        )
    progress.aggregator = aggregator
    progress.trainable = trainable
    if server_round > run.rounds - run.average_last:
        progress.tail = add(progress.tail, progress.trainable)
    progress.server_round = server_round


def _metrics(server: Server, progress: Progress) -> dict[str, float]:
    """Judges the model, unless it is a round in between."""
    run = server.config.run
    if progress.server_round == run.rounds:
        return judge(server, final_state(progress, server.config))
    if progress.server_round % run.evaluate_every == 0:
        return judge(server, progress.trainable)
    return {}


def _too_few(server: Server, server_round: int, tally: Tally, needed: float) -> str:
    asked = len(tally.outcomes)
    if server.hides_clients:
        note = {"cohort_size": asked, "replies": tally.replies, **tally.codes}
        server.secrets.note({"round": server_round, "stopped": note})
        return (
            f"Round {server_round}: too small a share of the cohort answered. Who and "
            f"why stands in {server.secrets.path}; mend the cause and start the run "
            "again (`simulate` with --resume)."
        )
    reasons = [f"{count} {code}" for code, count in tally.codes.items()]
    passed_over = server.config.cohort.size - asked
    if passed_over:
        reasons.append(f"{passed_over} not asked: busy, set aside or at their cap")
    return (
        f"Round {server_round}: expected at least {needed:g} of {asked + passed_over} "
        f"clients to answer, got {tally.replies} ({', '.join(reasons)}). Mend the "
        "cause and start the run again (`simulate` with --resume); what clients "
        "released stays charged. A client that failed in this round needs a new run, "
        "one past its budget a larger [privacy] budget_epsilon."
    )


def _log(server: Server, record: dict[str, Any]) -> None:
    shown = {key: "-" if value is None else value for key, value in record.items()}
    logger.info(
        "round=%(round)s replies=%(replies)s/%(cohort_size)s metric=%(metric)s "
        "bytes_up=%(bytes_up)s seconds=%(seconds)s",
        shown,
        extra={
            "record": record,
            "metric": server.model.task.metric,
            "run": server.run,
            "round": record["round"],
        },
    )
