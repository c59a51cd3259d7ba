"""Which of Flower's nodes is which client, where Flower numbers the nodes."""

import logging
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from client.context import read_introduction
from fedpeft.errors import InvalidPayload, RunError

POLL_SECONDS = 1.0

logger = logging.getLogger(__name__)


def find_nodes(grid: Grid, num_clients: int, patience_seconds: float) -> list[int]:
    """Returns the node of each client, in the clients' order, once all are there.

    Flower's node ids are random, so every node is asked which client it is. Nobody's
    privacy rests on the answer: a client counts in its own ledger, whatever it is
    called. But its index gives its place in the rotation, and with seeded noise the
    noise, so that a run is the same as under every other engine.

    Args:
        grid: Flower's.
        num_clients: of the scenario.
        patience_seconds: for all nodes to come, and once more for them to answer.

    Raises:
        RunError: if they are too many or too few, or do not share out the indices.
    """
    nodes = _wait(grid, num_clients, patience_seconds)
    messages = [Message(RecordDict(), node, "query") for node in nodes]
    found: dict[int, int] = {}
    for reply in grid.send_and_receive(messages, timeout=patience_seconds):
        index = _index(reply)
        if index in found:
            raise RunError(
                f"Expected a partition-id of its own at every node, got {index} twice: "
                "two clients would train on the same share."
            )
        if index is not None:
            found[index] = reply.metadata.src_node_id
    if sorted(found) != list(range(num_clients)):
        raise RunError(
            f"Expected {num_clients} nodes with partition-id 0 to {num_clients - 1}, "
            f"got answers from {sorted(found)}: give each of them its own, and see the "
            "log of those that did not answer."
        )
    return [found[client] for client in range(num_clients)]


def _wait(grid: Grid, num_clients: int, patience_seconds: float) -> list[int]:
    """Waits until there are as many nodes as clients."""
    deadline = time.monotonic() + patience_seconds
    seen = -1
    while len(nodes := sorted(grid.get_node_ids())) != num_clients:
        if len(nodes) > num_clients or time.monotonic() > deadline:
            raise RunError(_miscounted(len(nodes), num_clients))
        if len(nodes) != seen:
            seen = len(nodes)
            logger.warning("waiting for %d nodes, %d are there", num_clients, seen)
        time.sleep(POLL_SECONDS)
    return nodes


def _miscounted(nodes: int, num_clients: int) -> str:
    return (
        f"Expected {num_clients} nodes, one for each of [partition] num_clients, got "
        f"{nodes}: start as many SuperNodes, in a simulation with --federation-config "
        f'"num-supernodes={num_clients}".'
    )


def _index(reply: Message) -> int | None:
    """Returns which client a node says it is; None if it says nothing that counts."""
    if reply.has_error():
        logger.warning("a node failed: %s", reply.error.reason)
        return None
    try:
        return read_introduction(reply.content)
    except InvalidPayload as error:
        logger.warning("a node said: %s", error)
        return None
