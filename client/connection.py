"""The client's side: connect, answer, and connect again, for months.

The event loop only moves bytes. What takes long, loading the model and training, runs
in one worker thread, one thing at a time, while heartbeats go on.
"""

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Message

from client import fleet_pb2 as pb
from client.agreement import Proposal
from client.flower import set_identity, to_bytes
from client.racing import first_of
from client.settings import ClientSection
from client.stream import (
    ConnectionLost,
    Stream,
    beat,
    introduce,
    open_stream,
    refused,
    unless_lost,
)
from client.wire import (
    Arrival,
    Assembler,
    Refused,
    cut,
    our_protocol,
    read_message,
)
from fedpeft import __version__
from fedpeft.errors import ConfigError, InvalidPayload

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
"""Between two attempts to connect: doubled each time, from the first to the longest."""

LINGER_SECONDS = 10.0
"""For the server to acknowledge the last answer before a client that stops is gone."""

STOP_SECONDS = 0.2
"""Between two looks at whether to stop."""

QUEUED_REQUESTS = 2
"""Held while one is answered; more stay with the server."""

HELD_REQUESTS = 32
"""Whose answers have not arrived, as far as the server has said. It says so at once."""

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
        self._is_agreeing = False
        self._requests: asyncio.Queue[tuple[Arrival, int]] = asyncio.Queue(
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
        loop = asyncio.get_running_loop()
        while True:
            arrival, index = await self._requests.get()
            message_id = arrival.message_id
            async with self._at_work:
                work = loop.run_in_executor(self._worker, self._answer, arrival, index)
                del arrival  # as large as a message, and the next may be long to come
                self._answers[message_id] = await work
                if self._outbox is not None:
                    self._outbox.put_nowait(message_id)

    def _answer(self, request: Arrival, index: int) -> bytes:
        try:
            message = read_message(request.data or b"")
        except InvalidPayload as error:
            raise Refused("invalid-frame", str(error)) from None
        return to_bytes(self._handle(message, index))

    async def _stay_connected(self) -> None:
        """Returns when the run is complete."""
        pause, has_connected = FIRST_PAUSE_SECONDS, False
        while True:
            self._is_agreeing = False
            try:
                async with open_stream(self._section) as stream:
                    await self._converse(stream)
                return
            except (ConnectionLost, ConfigError) as error:
                # Keys may be in the middle of a renewal; a bad proposal stays bad.
                is_keys = has_connected and not self._is_agreeing
                if isinstance(error, ConfigError) and not is_keys:
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
        welcome = await introduce(stream, hello)
        proposal = Proposal(welcome.run, welcome.toml, welcome.backbone)
        await first_of(
            self._listen(stream, welcome.client),
            unless_lost(self._send(stream, proposal, welcome.client)),
            unless_lost(beat(stream, welcome.heartbeat_seconds)),
        )

    async def _listen(self, stream: Stream, index: int) -> None:
        """Takes in requests and acknowledgements; returns when the run is complete."""
        assembler, is_complete = Assembler(self._section.max_message_bytes), False
        while not is_complete:
            is_complete = await self._hear(assembler, index, *await stream.read())
        self._log(logging.INFO, "the run is complete")

    async def _hear(
        self, assembler: Assembler, index: int, frame: pb.ServerFrame, kind: str
    ) -> bool:
        """Takes in one frame; returns whether the run is complete.

        Raises:
            Refused: if the server ends the stream, or the frame is not due.
        """
        if kind == "begin":
            keep = frame.begin.message_id not in self._held
            if keep and len(self._held) >= HELD_REQUESTS:
                raise Refused(
                    "invalid-frame",
                    f"Expected at most {HELD_REQUESTS} requests whose answers have not "
                    "arrived, got another.",
                )
            assembler.begin(frame.begin, keep=keep)
        elif kind == "chunk":
            arrival = assembler.add(frame.chunk)
            if arrival is not None and arrival.data is not None:
                await self._requests.put((arrival, index))
                self._held.add(arrival.message_id)
        elif kind == "received":
            if self._answers.pop(frame.received.message_id, None) is not None:
                self._held.discard(frame.received.message_id)
        elif kind != "finished":
            raise refused(frame, kind)
        return kind == "finished"

    async def _send(self, stream: Stream, proposal: Proposal, index: int) -> None:
        """Makes sure of the agreement, says so, and sends answers as they come."""
        if (proposal, index) != self._agreed:
            loop = asyncio.get_running_loop()
            self._is_agreeing = True
            await loop.run_in_executor(self._worker, self._agree, proposal, index)
            self._is_agreeing, self._agreed = False, (proposal, index)
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
            if message_id in self._answers:
                for frame in cut(pb.ClientFrame, message_id, self._answers[message_id]):
                    await stream.write(frame)
                    del frame  # it would be held while nothing is to be sent

    def _log(self, level: int, text: str) -> None:
        name = self._section.name
        run = self._agreed[0].run if self._agreed else None
        logger.log(
            level, "client=%s %s", name, text, extra={"client": name, "run": run}
        )
