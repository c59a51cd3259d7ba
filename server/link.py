"""One stream of one client, as the event loop reads and writes it."""

import asyncio
import contextlib
from typing import Any

import grpc

from client import fleet_pb2 as pb
from client.wire import Refused, read_frame

FAREWELL_SECONDS = 5.0
"""For a client to take the last frame, and to leave."""


class Link:
    """A client's connection, from its first byte to its last.

    Attributes:
        name: the client's; until it has said who it is, where it comes from.
        fingerprint: of its certificate.
        client: its index; -1 until it is admitted.
        is_ready: whether it has accepted the plan and is warm.
        at_work: ids of the requests that it has, or is being sent.
        outbox: ids of the requests to send, in order.
        unasked: how many answers to no request of this run it has sent.

    Args:
        context: of gRPC.
        patience_seconds: that any single frame may take, either way.
    """

    def __init__(self, context: Any, patience_seconds: float) -> None:
        self.name: str = context.peer()
        self.fingerprint: str | None = None
        self.client = -1
        self.is_ready = False
        self.at_work: set[str] = set()
        self.outbox: asyncio.Queue[str] = asyncio.Queue()
        self.unasked = 0
        self._context = context
        self._patience_seconds = patience_seconds
        self._turn = asyncio.Lock()
        self._writing: asyncio.Future[None] | None = None
        self._dismissal: asyncio.Future[Refused | None] = (
            asyncio.get_running_loop().create_future()
        )

    @property
    def auth_context(self) -> dict[str, list[bytes]]:
        """What the TLS handshake proved."""
        context: dict[str, list[bytes]] = self._context.auth_context()
        return context

    async def read(self, seconds: float | None = None) -> tuple[pb.ClientFrame, str]:
        """Returns the next frame and its kind.

        Raises:
            EOFError: once the client has no more.
            Refused: if the bytes are no frame.
            TimeoutError: if none comes in time.
        """
        async with asyncio.timeout(seconds or self._patience_seconds):
            data = await self._context.read()
        if data is grpc.aio.EOF:
            raise EOFError
        return read_frame(pb.ClientFrame, data)

    async def write(self, frame: bytes) -> None:
        """Writes a frame, and returns once the network has room for it.

        A cancelled writer leaves its frame on the way: gRPC cannot take it back, and
        takes the next one only when it is gone.

        Raises:
            ConnectionError: if the client is gone.
            TimeoutError: if it reads nothing.
        """
        async with self._turn, asyncio.timeout(self._patience_seconds):
            if self._writing is not None:
                await asyncio.wait([self._writing])
            self._writing = asyncio.ensure_future(self._context.write(frame))
            self._writing.add_done_callback(_look_at)
            try:
                await asyncio.shield(self._writing)
            except Exception as error:  # gRPC has several, some of them private
                raise ConnectionError(str(error)) from None

    def dismiss(self, refusal: Refused | None) -> None:
        """Ends the stream from outside: refused, or because the run is complete."""
        if not self._dismissal.done():
            self._dismissal.set_result(refusal)

    async def dismissed(self) -> bool:
        """Waits until the server ends the stream; returns True if the run is complete.

        Raises:
            Refused: if that is why.
        """
        # A cancelled wait would cancel what it waits for, and others wait too.
        refusal = await asyncio.shield(self._dismissal)
        if refusal is not None:
            raise refusal
        return True

    async def end(self, last: pb.ServerFrame, *, wait: bool = False) -> None:
        """Says the last word.

        Args:
            last: the frame.
            wait: for the client to leave: when this process is about to end.
        """
        with contextlib.suppress(TimeoutError, ConnectionError, EOFError, Refused):
            async with asyncio.timeout(FAREWELL_SECONDS):
                await self.write(last.SerializeToString())
                while wait:
                    await self.read()


def _look_at(writing: asyncio.Future[None]) -> None:
    """Spares the log the complaint that nobody looked."""
    if not writing.cancelled():
        writing.exception()
