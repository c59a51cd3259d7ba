"""A Flower Grid without network: it calls the ClientApp directly."""

import uuid
from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import NoReturn

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from client.flower import set_message_id
from simulations.workers import WorkerPool


class InProcessGrid(Grid):
    """Delivers messages to simulated clients; node ``i + 1`` is client ``i``.

    Args:
        pool: where the clients run.
        num_clients: how many there are.
    """

    def __init__(self, pool: WorkerPool, num_clients: int) -> None:
        self._pool = pool
        self._num_clients = num_clients
        self._pending: dict[str, Future[Message]] = {}

    def set_run(self, run: object) -> None:
        """There is one run."""

    @property
    def run(self) -> NoReturn:
        """Not offered: nothing here reads it."""
        raise AttributeError("An in-process grid has no Flower run record.")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Creates a message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Returns all nodes, sorted."""
        return list(range(1, self._num_clients + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Starts the clients' work; returns the messages' ids."""
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            set_message_id(message, message_id)
            client = message.metadata.dst_node_id - 1
            self._pending[message_id] = self._pool.submit(message, client)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the replies that are ready."""
        ready = [i for i in message_ids if self._pending[i].done()]
        return [self._pending.pop(i).result() for i in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Sends messages and waits for all replies, at most `timeout` seconds."""
        ids = self.push_messages(messages)
        wait([self._pending[i] for i in ids], timeout=timeout)
        return self.pull_messages(ids)
