"""The client's side: connect, answer, and connect again, for months.

The event loop only moves bytes. What takes long, loading the model and training, runs
in one worker thread, one thing at a time, while heartbeats go on.
"""

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flwr.app import Message

from client import fleet_pb2 as pb
from client.agreement import Proposal
from client.flower import set_identity, to_bytes
from client.racing import first_of
from client.settings import ClientSection
from client.stream import ConnectionLost, Stream, one_line, open_stream
from client.wire import (
    HELLO_SECONDS,
    Assembler,
    Refused,
    check_protocol,
    cut,
    our_protocol,
    read_message,
)
from fedpeft import __version__
from fedpeft.errors import ConfigError

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
"""Between two attempts to connect: doubled each time, from the first to the longest."""

LINGER_SECONDS = 10.0
"""For the server to acknowledge the last answer before a client that stops is gone."""

STOP_SECONDS = 0.2
"""Between two looks at whether to stop."""

QUEUED_REQUESTS = 8
"""Held while one is answered; more stay with the server."""

Agree = Callable[[Proposal, int], None]
Handle = Callable[[Message, int], Message]


def run_client(
    section: ClientSection,
    agree: Agree,
    handle: Handle,
    *,
    stop: threading.Event | None = None,
) -> None:
    """Answers a server's requests until the run is complete.

    **Guarantees**: a request is handled once, however often the connection breaks; its
    answer is kept and sent again, the same bytes, until the server has said that it
    arrived. What a server that was started anew asks again is handled again.

    Args:
        section: whom to answer, as whom.
        agree: is given the server's proposal and the client's index, makes itself ready
            or raises; asked again only if either has changed.
        handle: answers one message, as the client of this index. Both run in one
            thread, never at the same time.
        stop: once set, the request under way is the last.

    Raises:
        ConfigError: if, from the start, the keys cannot be used or the server's are not
            to be trusted.
        Refused: if the server refuses this client, or sends what it must not.
        FedpeftError: whatever `agree` or `handle` raise.
    """
    set_identity()
    with ThreadPoolExecutor(1, "client") as worker:
        client = _Client(section, agree, handle, worker)
        asyncio.run(client.live(stop or threading.Event()))


class _Client:
    """What outlives a connection: requests under way, answers not acknowledged."""

    def __init__(
        self,
        section: ClientSection,
        agree: Agree,
        handle: Handle,
        worker: ThreadPoolExecutor,
    ) -> None:
        self._section = section
        self._agree = agree
        self._handle = handle
        self._worker = worker
        self._agreed: tuple[Proposal, int] | None = None
        self._requests: asyncio.Queue[tuple[str, bytearray, int]] = asyncio.Queue(
            QUEUED_REQUESTS
        )
        self._answers: dict[str, bytes] = {}
        self._held: set[str] = set()
        self._outbox: asyncio.Queue[str] | None = None
        self._at_work = asyncio.Lock()

    async def live(self, stop: threading.Event) -> None:
        """Works and stays connected until the run or the client is to end."""
        await first_of(self._work(), self._stay_connected(), self._until(stop))

    async def _until(self, stop: threading.Event) -> None:
        """Waits for the order to stop, and then for the request under way."""
        while not stop.is_set():
            await asyncio.sleep(STOP_SECONDS)
        await self._at_work.acquire()  # and never gives it back: no further request
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._answers and self._outbox is not None:
                    await asyncio.sleep(STOP_SECONDS / 10)

    async def _work(self) -> None:
        """Answers requests one by one, connected or not."""
        while True:
            message_id, data, index = await self._requests.get()
            async with self._at_work:
                loop = asyncio.get_running_loop()
                self._answers[message_id] = await loop.run_in_executor(
                    self._worker, self._answer, data, index
                )
                if self._outbox is not None:
                    self._outbox.put_nowait(message_id)

    def _answer(self, data: bytearray, index: int) -> bytes:
        return to_bytes(self._handle(read_message(data), index))

    async def _stay_connected(self) -> None:
        """Returns when the run is complete."""
        pause, has_connected = FIRST_PAUSE_SECONDS, False
        while True:
            try:
                async with open_stream(self._section) as stream:
                    await self._converse(stream)
                return
            except (ConnectionLost, ConfigError) as error:
                if isinstance(error, ConfigError) and not has_connected:
                    raise
                reason = str(error)
            finally:
                was_ready, self._outbox = self._outbox is not None, None
            if was_ready:
                pause, has_connected = FIRST_PAUSE_SECONDS, True
            seconds = pause * random.uniform(0.5, 1)  # not all clients at once
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._log(
                logging.WARNING, f"connection lost: {reason}; again in {seconds:.1f} s"
            )
            await asyncio.sleep(seconds)

    async def _converse(self, stream: Stream) -> None:
        """Holds one conversation; returns when the run is complete.

        Raises:
            ConnectionLost: if another one is worth trying.
            Refused: if not.
        """
        hello = pb.Hello(
            protocol=our_protocol(), software=__version__, name=self._section.name
        )
        welcome = await _introduce(stream, hello)
        proposal = Proposal(welcome.run, welcome.toml, welcome.backbone)
        await first_of(
            self._listen(stream, welcome.client),
            _unless_lost(self._send(stream, proposal, welcome.client)),
            _unless_lost(_beat(stream, welcome.heartbeat_seconds)),
        )

    async def _listen(self, stream: Stream, index: int) -> None:
        """Takes in requests and acknowledgements; returns when the run is complete."""
        assembler = Assembler(self._section.max_message_bytes)
        while True:
            frame, kind = await stream.read()
            if kind == "begin":
                keep = frame.begin.message_id not in self._held
                assembler.begin(frame.begin, keep=keep)
            elif kind == "chunk":
                arrival = assembler.add(frame.chunk)
                if arrival is not None and arrival.data is not None:
                    await self._requests.put((arrival.message_id, arrival.data, index))
                    self._held.add(arrival.message_id)
            elif kind == "received":
                self._answers.pop(frame.received.message_id, None)
                self._held.discard(frame.received.message_id)
            elif kind == "finished":
                self._log(logging.INFO, "the run is complete")
                return
            else:
                raise _refused(frame, kind)

    async def _send(self, stream: Stream, proposal: Proposal, index: int) -> None:
        """Makes sure of the agreement, says so, and sends answers as they come."""
        if (proposal, index) != self._agreed:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._worker, self._agree, proposal, index)
            self._agreed = proposal, index
        for message_id in sorted(self._held):
            received = pb.Received(message_id=message_id)
            await stream.write(pb.ClientFrame(received=received).SerializeToString())
        ready = pb.ClientFrame(ready=pb.Ready(accepted=proposal.hash))
        await stream.write(ready.SerializeToString())
        self._log(logging.INFO, f"connected server={self._section.server}")
        self._outbox = asyncio.Queue()
        for message_id in self._answers:
            self._outbox.put_nowait(message_id)
        while True:
            message_id = await self._outbox.get()
            data = self._answers.get(message_id)
            if data is not None:
                for frame in cut(pb.ClientFrame, message_id, data):
                    await stream.write(frame)

    def _log(self, level: int, text: str) -> None:
        name = self._section.name
        run = self._agreed[0].run if self._agreed else None
        logger.log(
            level, "client=%s %s", name, text, extra={"client": name, "run": run}
        )


async def _introduce(stream: Stream, hello: pb.Hello) -> pb.Welcome:
    """Says Hello and returns the server's Welcome.

    Raises:
        ConnectionLost: if none comes.
        Refused: if the server does not want this client, or makes no sense.
    """
    try:
        async with asyncio.timeout(2 * HELLO_SECONDS):  # to connect, and to answer
            await stream.write(pb.ClientFrame(hello=hello).SerializeToString())
            frame, kind = await stream.read()
    except TimeoutError:
        raise ConnectionLost("the server does not answer") from None
    if kind != "welcome":
        raise _refused(frame, kind)
    check_protocol(frame.welcome.protocol)
    if not 0.01 <= frame.welcome.heartbeat_seconds <= 3600:
        raise Refused("invalid-frame", "Expected a heartbeat of 0.01 to 3600 s.")
    return frame.welcome


async def _beat(stream: Stream, seconds: float) -> None:
    """Shows that the client lives."""
    heartbeat = pb.ClientFrame(heartbeat=pb.Heartbeat()).SerializeToString()
    while True:
        await asyncio.sleep(seconds)
        await stream.write(heartbeat)


async def _unless_lost(speaking: Coroutine[Any, Any, None]) -> None:
    """Speaks; on a lost connection it waits, since the reader may know the reason."""
    with contextlib.suppress(ConnectionLost):
        await speaking
    await asyncio.Event().wait()


def _refused(frame: pb.ServerFrame, kind: str) -> Refused:
    """Returns why the conversation ends: the server says so, or makes no sense."""
    if kind != "refusal":
        return Refused("invalid-frame", f"Expected no {kind} at this point.")
    code = one_line(frame.refusal.code)
    reason = one_line(frame.refusal.reason)
    return Refused(code, f"The server refused this client ({code}): {reason}")
