"""The round loop: ask a cohort, aggregate, apply, evaluate, checkpoint.

It is ours because a private run must stop where Flower's own loop carries on: when too
few clients answer, the run ends with the reason and can be resumed.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from client.messages import TrainReply, TrainRequest
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.durable import append_durably, write_atomically
from fedpeft.errors import InvalidPayload, RunError
from fedpeft.evaluation import evaluate
from fedpeft.interfaces import Aggregator, Compressor, Payload, Update
from fedpeft.model import TaskModel, load_trainable_state
from fedpeft.privacy import ENROLMENT, Plan, Randomness
from fedpeft.tensors import Tensors, add, scale
from server.checkpoint import Progress, save_checkpoint
from server.cohort import SecretFile, rotation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """What the loop needs and does not change.

    Attributes:
        run: the run's id.
        held_out: the server's own public data, on which every model is judged.
        output: the run directory.
        randomness: where a round's secret cohort comes from, by its number.
    """

    run: str
    config: RunConfig
    plan: Plan | None
    model: TaskModel
    aggregator: Aggregator
    compressor: Compressor
    held_out: Encoded
    output: Path
    randomness: Callable[[int], Randomness]

    @property
    def hides_clients(self) -> bool:
        """Whether who answered, and how many, is nobody else's business."""
        return self.plan is not None and not self.plan.is_dp_sgd

    @property
    def secrets(self) -> SecretFile:
        """What stays with the server."""
        return SecretFile(self.output / "server" / "secrets.jsonl")


@dataclass
class Tally:
    """What one round received."""

    codes: Counter[str] = field(default_factory=Counter)
    replies: int = 0
    bytes_up: int = 0
    entropy_bits: float = 0.0


def run_rounds(grid: Grid, server: Server, progress: Progress) -> Progress:
    """Runs all rounds after `progress`; each ends with a checkpoint and an event line.

    Raises:
        RunError: if too small a share of a cohort answers.
    """
    if server.plan is not None and server.plan.is_secret and not progress.server_round:
        enrol(grid, server, progress)
    for server_round in range(progress.server_round + 1, server.config.run.rounds + 1):
        record = _run_round(grid, server, progress, server_round)
        progress.records.append(record)
        save_checkpoint(server.output / "checkpoint", progress, server.config.hash)
        line = json.dumps(record).encode() + b"\n"
        append_durably(server.output / "events.jsonl", line)
        _log(record)
    return progress


def enrol(grid: Grid, server: Server, progress: Progress) -> None:
    """Has every client charge the whole run to its ledger, drawn later or not.

    Raises:
        RunError: if one does not: the plan counts on all of them.
    """
    clients = range(server.config.partition.num_clients)
    requests = {
        client: _request(server, progress, ENROLMENT, client, b"") for client in clients
    }
    replies = exchange(grid, requests)
    joined = [client for client in clients if _code(replies, client) == "ok"]
    for client in joined:
        reply = replies[client]
        progress.acknowledged[client] = (reply.ledger_length, reply.ledger_head)
    if len(joined) < len(clients):
        codes = Counter(_code(replies, client) for client in clients)
        raise RunError(
            f"Expected all {len(clients)} clients to join, got "
            f"{', '.join(f'{n} {code}' for code, n in sorted(codes.items()))}: every "
            "client is charged for a run with secret cohorts. Mend the cause and go on "
            "with --resume; a new run charges those that joined again."
        )


def _code(replies: dict[int, TrainReply], client: int) -> str:
    return replies[client].code if client in replies else "silent"


def restore_events(output: Path, progress: Progress) -> None:
    """Rewrites ``events.jsonl`` to what the checkpoint knows."""
    lines = [json.dumps(record).encode() + b"\n" for record in progress.records]
    write_atomically(output / "events.jsonl", b"".join(lines))


def final_state(progress: Progress, config: RunConfig) -> Tensors:
    """Returns the trainable state of the final model: the mean of the last rounds'."""
    return scale(progress.tail, 1 / min(config.run.average_last, config.run.rounds))


def judge(server: Server, state: Tensors) -> float:
    """Returns the metric of a state on the held-out data, with all cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    try:
        load_trainable_state(server.model, state)
        precision = server.config.training.precision
        return evaluate(server.model, server.held_out, precision)
    finally:
        torch.set_num_threads(threads)


def _run_round(
    grid: Grid, server: Server, progress: Progress, server_round: int
) -> dict[str, Any]:
    """Advances `progress` by one round and returns the round's record."""
    started = time.perf_counter()
    cohort = _cohort(server, server_round)
    state = COMPRESSORS["dense"]().compress(progress.trainable, torch.Generator())
    requests = {
        client: _request(server, progress, server_round, client, state.to_bytes())
        for client in cohort
    }
    for client in cohort:
        progress.asked[client] = progress.asked.get(client, 0) + 1
    replies = exchange(grid, requests)
    tally = Tally()
    updates = _updates(server, progress, replies, tally)
    _advance(server, progress, server_round, updates, tally, len(cohort))
    metric = _metric(server, progress)
    counts: dict[str, int | float | None] = {
        "cohort_size": len(cohort),
        "replies": tally.replies,
        "failures": len(cohort) - tally.replies,
        "bytes_up": tally.bytes_up,
        "bytes_down": sum(len(request.state) for request in requests.values()),
        "entropy_bytes": round(tally.entropy_bits / 8),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if server.hides_clients:
        server.secrets.note({"round": server_round, **counts})
        counts = dict.fromkeys(counts)
    return {"round": server_round, **counts, "metric": metric}


def _cohort(server: Server, server_round: int) -> list[int]:
    """Returns whom to ask."""
    cohort, num_clients = server.config.cohort, server.config.partition.num_clients
    if cohort.sampling == "rotation":
        return rotation(server_round, cohort.size, num_clients)
    source = server.randomness(server_round)
    return server.secrets.cohort(server.config, server_round, source)


def _advance(
    server: Server,
    progress: Progress,
    server_round: int,
    updates: Iterator[Update],
    tally: Tally,
    cohort_size: int,
) -> None:
    """Aggregates and applies the round, or refuses it and leaves `progress`.

    An empty cohort, which a Poisson draw may give, is a round of noise alone.

    Raises:
        RunError: if too small a share of the cohort answered.
    """
    run = server.config.run
    needed = server.config.cohort.min_reply_share * cohort_size
    first = next(updates, None)
    if first is None and cohort_size:
        raise RunError(_too_few(server, server_round, cohort_size, tally, needed))
    stream = updates if first is None else chain([first], updates)
    step, aggregator = server.aggregator.aggregate(stream, progress.aggregator)
    if tally.replies < needed:
        raise RunError(_too_few(server, server_round, cohort_size, tally, needed))
    progress.aggregator = aggregator
    progress.trainable = add(progress.trainable, step)
    if server_round > run.rounds - run.average_last:
        progress.tail = add(progress.tail, progress.trainable)
    progress.server_round = server_round


def _request(
    server: Server, progress: Progress, server_round: int, client: int, state: bytes
) -> TrainRequest:
    length, head = progress.acknowledged.get(client, (0, ""))
    return TrainRequest(
        run=server.run,
        server_round=server_round,
        config_hash=server.config.hash,
        plan_hash=server.plan.hash if server.plan else "",
        backbone=server.model.fingerprint,
        state=state,
        ledger_length=length,
        ledger_head=head,
        # Two checkpoints are kept: a fall-back may ask again for the last two rounds.
        durable_round=max(0, server_round - 3),
    )


def exchange(grid: Grid, requests: dict[int, TrainRequest]) -> dict[int, TrainReply]:
    """Sends each client its request and waits for the replies that come.

    A message that is an error, or no train reply, counts as ``failed``.
    """
    nodes = sorted(grid.get_node_ids())
    messages = [
        Message(
            request.to_record(),
            dst_node_id=nodes[client],
            message_type="train",
            group_id=str(request.server_round),
        )
        for client, request in requests.items()
    ]
    replies = {}
    for message in grid.send_and_receive(messages):
        client = nodes.index(message.metadata.src_node_id)
        if client in requests:
            replies[client] = _read_reply(client, message)
    return replies


def _read_reply(client: int, message: Message) -> TrainReply:
    if message.has_error():
        logger.warning("client=%d error=%s", client, message.error.reason)
        return TrainReply("failed")
    try:
        return TrainReply.from_record(message.content)
    except InvalidPayload as error:
        logger.warning("client=%d invalid reply: %s", client, error)
        return TrainReply("failed")


def _updates(
    server: Server, progress: Progress, replies: dict[int, TrainReply], tally: Tally
) -> Iterator[Update]:
    """Decodes the replies one by one, in the clients' order, not that of arrival."""
    for client in sorted(replies):
        reply = replies.pop(client)
        if reply.code == "ok":
            try:
                payload = Payload.from_bytes(reply.payload)
                template = progress.trainable
                tensors = server.compressor.decompress(payload, template)
            except InvalidPayload as error:
                logger.warning("client=%d invalid payload: %s", client, error)
                tally.codes["invalid-payload"] += 1
                continue
            tally.replies += 1
            tally.bytes_up += len(reply.payload)
            tally.entropy_bits += server.compressor.entropy_bits(payload, template)
            progress.acknowledged[client] = (reply.ledger_length, reply.ledger_head)
            yield Update(
                tensors, reply.num_examples if reply.num_examples >= 0 else None
            )
        else:
            tally.codes[reply.code] += 1


def _metric(server: Server, progress: Progress) -> float | None:
    run = server.config.run
    if progress.server_round == run.rounds:
        return judge(server, final_state(progress, server.config))
    if progress.server_round % run.evaluate_every == 0:
        return judge(server, progress.trainable)
    return None


def _too_few(
    server: Server, server_round: int, cohort_size: int, tally: Tally, needed: float
) -> str:
    if server.hides_clients:
        note = {"cohort_size": cohort_size, "replies": tally.replies, **tally.codes}
        server.secrets.note({"round": server_round, "stopped": note})
        return (
            f"Round {server_round}: too small a share of the cohort answered. Who and "
            f"why stands in {server.secrets.path}; mend the cause and go on with "
            "--resume."
        )
    codes = ", ".join(f"{count} {code}" for code, count in sorted(tally.codes.items()))
    silent = cohort_size - tally.replies - sum(tally.codes.values())
    reasons = codes + (f"{', ' if codes else ''}{silent} silent" if silent else "")
    return (
        f"Round {server_round}: expected at least {needed:g} of {cohort_size} clients "
        f"to answer, got {tally.replies} ({reasons}). Mend the cause and go on with "
        "--resume; what clients released stays charged. A client that failed in this "
        "round needs a new run, one past its budget a larger [privacy] budget_epsilon."
    )


def _log(record: dict[str, Any]) -> None:
    shown = {key: "-" if value is None else value for key, value in record.items()}
    logger.info(
        "round=%(round)s replies=%(replies)s/%(cohort_size)s metric=%(metric)s "
        "bytes_up=%(bytes_up)s seconds=%(seconds)s",
        shown,
        extra={"record": record},
    )
