"""Questions to clients and their answers: messages out, updates in."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from client.messages import TrainReply, TrainRequest
from fedpeft.errors import InvalidPayload, RunError
from fedpeft.interfaces import Payload, Update
from fedpeft.privacy import ENROLMENT
from fedpeft.tensors import Tensors, flatten
from server.checkpoint import Progress
from server.setup import Server

SILENT = "silent"
"""The outcome of a client that did not answer in time."""

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """What one round received.

    Attributes:
        outcomes: client -> ``ok``, or why its answer does not count.
    """

    outcomes: dict[int, str]
    bytes_up: int = 0
    entropy_bits: float = 0.0

    @property
    def replies(self) -> int:
        """The number of answers that count."""
        return sum(outcome == "ok" for outcome in self.outcomes.values())

    @property
    def codes(self) -> dict[str, int]:
        """How often each reason came, sorted by reason."""
        reasons = Counter(o for o in self.outcomes.values() if o != "ok")
        return dict(sorted(reasons.items()))


def enrol(grid: Grid, server: Server, progress: Progress) -> None:
    """Has every client charge the whole run to its ledger, drawn later or not.

    Raises:
        RunError: if one does not: the plan counts on all of them.
    """
    clients = range(server.config.partition.num_clients)
    requests = {
        client: request_to(server, progress, ENROLMENT, client, b"")
        for client in clients
    }
    replies = exchange(grid, server, requests)
    tally = Tally(dict.fromkeys(clients, SILENT))
    for client, reply in replies.items():
        tally.outcomes[client] = reply.code
        if reply.code == "ok":
            progress.acknowledged[client] = (reply.ledger_length, reply.ledger_head)
    if tally.codes:
        got = ", ".join(f"{n} {code}" for code, n in tally.codes.items())
        raise RunError(
            f"Expected all {len(clients)} clients to join, got {tally.replies} "
            f"({got}): every "
            "client is charged for a run with secret cohorts. Mend the cause and start "
            "the run again (`simulate` with --resume); a new run charges those that "
            "joined again."
        )


def request_to(
    server: Server, progress: Progress, server_round: int, client: int, state: bytes
) -> TrainRequest:
    """Returns what one client is asked in a round."""
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


def exchange(
    grid: Grid, server: Server, requests: dict[int, TrainRequest]
) -> dict[int, TrainReply]:
    """Sends each client its request and waits for the replies, until the deadline.

    A message that is an error, or no train reply, counts as ``failed``. One that comes
    from no client, such as what Flower says of a node that is gone, counts as silence.
    """
    nodes = server.runtime.nodes or sorted(grid.get_node_ids())
    clients = {node: client for client, node in enumerate(nodes)}
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
    timeout = server.runtime.deadline_seconds
    for message in grid.send_and_receive(messages, timeout=timeout):
        client = clients.get(message.metadata.src_node_id, -1)
        if client in requests:
            replies[client] = _read_reply(server, client, message)
    return replies


def _read_reply(server: Server, client: int, message: Message) -> TrainReply:
    if message.has_error():
        _warn(server, client, "answered with an error, code %d", message.error.code)
        return TrainReply("failed")
    try:
        return TrainReply.from_record(message.content)
    except InvalidPayload as error:
        _warn(server, client, "invalid reply: %s", error)
        return TrainReply("failed")


def _warn(server: Server, client: int, text: str, reason: object) -> None:
    name = server.runtime.name(client)
    extra = {"run": server.run, "client": name}
    logger.warning("client=%s " + text, name, reason, extra=extra)


def decode_updates(
    server: Server, progress: Progress, replies: dict[int, TrainReply], tally: Tally
) -> Iterator[Update]:
    """Decodes the replies one by one, in the clients' order, not that of arrival."""
    template = progress.trainable
    for client in sorted(replies):
        reply = replies.pop(client)
        tally.outcomes[client] = reply.code
        if reply.ledger_length:
            progress.acknowledged[client] = (reply.ledger_length, reply.ledger_head)
        if reply.code != "ok":
            continue
        try:
            payload = Payload.from_bytes(reply.payload)
            tensors = server.compressor.decompress(payload, template)
            _check_size(tensors)
        except InvalidPayload as error:
            _warn(server, client, "invalid payload: %s", error)
            tally.outcomes[client] = "invalid-payload"
            continue
        tally.bytes_up += len(reply.payload)
        tally.entropy_bits += server.compressor.entropy_bits(payload, template)
        yield Update(tensors, reply.num_examples if reply.num_examples >= 0 else None)


def _check_size(update: Tensors) -> None:
    """Refuses what could carry a sum beyond the largest number.

    Raises:
        InvalidPayload: if the squared norm is no number in fp32.
    """
    if not flatten(update).float().square().sum().isfinite():
        raise InvalidPayload("Expected an update of finite norm, got a larger one.")
