"""A Flower grid over gRPC: the same ServerApp, real clients."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

import grpc
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from client.agreement import Proposal
from client.flower import set_identity
from client.tls import server_credentials
from client.wire import CONNECT, FRAME_BYTES
from fedpeft.errors import RunError
from server.allowlist import AllowList
from server.door import Door
from server.fleet import Fleet
from server.link import FAREWELL_SECONDS
from server.settings import ServerSection
from server.slots import Slots

T = TypeVar("T")

OPTIONS = [
    ("grpc.max_receive_message_length", FRAME_BYTES),
    # Identity alone: a compressed frame could be any length once it is unpacked.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_concurrent_streams", 1),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # a second server on the port is an error
]

LAST_TASKS_SECONDS = 1.0
"""For what gRPC still does once its server has stopped: moments."""


class GrpcGrid(Grid):
    """Reaches clients wherever they are; a message waits for a client that is away.

    The service runs in an event loop of a thread of its own; all methods may be called
    from any thread.

    Attributes:
        proposal: what clients must have accepted.

    Args:
        section: address, keys and heartbeat.
        proposal: the run.
        allow: who may come in.
        slots: which client of the scenario each name is.
        max_reply_bytes: of one answer.
    """

    def __init__(
        self,
        section: ServerSection,
        proposal: Proposal,
        allow: AllowList,
        slots: Slots,
        max_reply_bytes: int,
    ) -> None:
        self.proposal = proposal
        self._section = section
        self._allow = allow
        self._slots = slots
        self._fleet = Fleet(
            proposal,
            Door(allow, slots, insecure=section.insecure),
            max_reply_bytes=max_reply_bytes,
            heartbeat_seconds=section.heartbeat_seconds,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing: asyncio.Future[bool] | None = None

    def start(self) -> int:
        """Listens; returns the port.

        Raises:
            ConfigError: if the keys cannot be used.
            RunError: if the address cannot be had.
        """
        set_identity()
        port: Future[int] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._live(port)), name="fleet"
        )
        self._thread.start()
        return port.result()

    def finish(self) -> None:
        """Tells clients that the run is complete: now, or when they connect."""
        self._ask(self._fleet.finish)

    def untold(self, clients: Iterable[int]) -> list[str]:
        """Returns the names of those who may come in and have not heard of the end."""
        names = {self._slots.name(one) for one in set(clients) - self._fleet.told}
        return sorted(names & set(self._allow.names()))

    def close(self, *, finished: bool) -> None:
        """Ends all streams; waits of other threads return with what they have.

        Args:
            finished: whether the run is complete: then clients are told so, and have a
                moment to take it in; otherwise they will try to connect again.
        """
        if self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._set_closing, finished)
        self._thread.join()
        self._loop = self._thread = None

    def stop_waiting(self) -> None:
        """Has other threads return from their waits, now and from now on."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fleet.mailbox.close)

    def set_run(self, run: object) -> None:
        """There is one run."""

    @property
    def run(self) -> NoReturn:
        """Not offered: nothing here reads it."""
        raise AttributeError("A grid over gRPC has no Flower run record.")

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
        """Returns all nodes, sorted, connected or not."""
        return list(range(1, self.proposal.config.partition.num_clients + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends messages as soon as their clients are there; returns their ids."""
        return self._ask(lambda: self._fleet.push(list(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the replies that are there."""
        return self._ask(lambda: self._fleet.mailbox.take(list(message_ids)))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Sends messages and waits for all replies, at most `timeout` seconds.

        What is not answered by then is withdrawn: an answer that comes later is counted
        and dropped.
        """
        return self._do(self._fleet.exchange(list(messages), timeout))

    def connected(self) -> list[str]:
        """Returns the names of the clients that are ready, sorted."""
        return sorted(link.name for link in self._fleet.links)

    def connections(self) -> dict[int, int]:
        """Returns how often each client has connected and become ready."""
        return dict(self._fleet.connections)

    def busy(self) -> set[int]:
        """Returns the clients still at work on a request that was withdrawn."""
        is_withdrawn = self._fleet.mailbox.is_withdrawn
        return {
            link.client
            for link in self._fleet.links
            if any(is_withdrawn(link.client, one) for one in list(link.at_work))
        }

    def counts(self) -> dict[str, int]:
        """Returns how often each refusal, and each answer nobody waited for, came."""
        return dict(self._fleet.mailbox.counts)

    async def _live(self, port: "Future[int]") -> None:
        """The life of the thread: listen, wait for the end, end."""
        loop = asyncio.get_running_loop()
        self._closing = loop.create_future()
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((_handler(self._fleet),))
        try:
            number = _bind(server, self._section)
            await server.start()
        except BaseException as error:
            port.set_exception(error)
            return
        self._loop = loop
        port.set_result(number)
        finished = await self._closing
        self._fleet.mailbox.close()
        if finished:
            self._fleet.finish()
        await server.stop(FAREWELL_SECONDS if finished else None)
        await _others_end()

    def _set_closing(self, finished: bool) -> None:
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(finished)

    def _ask(self, question: Callable[[], T]) -> T:
        async def answer() -> T:
            return question()

        return self._do(answer())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise RunError("Expected a grid that was started, got one that was not.")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _others_end() -> None:
    """Waits for gRPC's tasks: ended with the loop, they would be logged as errors."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=LAST_TASKS_SECONDS)


def _handler(fleet: Fleet) -> grpc.GenericRpcHandler:
    """Returns the one method; frames stay bytes, so that ours is the only parser."""
    _, service, method = CONNECT.split("/")
    connect = grpc.stream_stream_rpc_method_handler(fleet.connect)
    return grpc.method_handlers_generic_handler(service, {method: connect})


def _bind(server: grpc.aio.Server, section: ServerSection) -> int:
    """Takes the address.

    Raises:
        RunError: if it is taken, or no address.
    """
    try:
        if section.insecure:
            return int(server.add_insecure_port(section.address))
        credentials = server_credentials(section)
        return int(server.add_secure_port(section.address, credentials))
    except RuntimeError:
        raise RunError(
            f"Cannot listen at {section.address}: is another server running there?"
        ) from None
