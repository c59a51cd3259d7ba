"""One stream to the server, as the client's event loop reads and writes it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from client import fleet_pb2 as pb
from client.settings import ClientSection
from client.tls import client_credentials
from client.wire import (
    CONNECT,
    FRAME_BYTES,
    HELLO_SECONDS,
    Refused,
    check_protocol,
    read_frame,
)
from fedpeft.errors import ConfigError
from fedpeft.wording import printable

OPTIONS = [
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # identity alone
    ("grpc.enable_retries", 0),  # we connect again ourselves, with keys read anew
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]

_IMPROPER = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")
"""What gRPC writes of a server's certificate; it has no status of its own for it."""

_QUOTED = 300
"""Letters of what the server says of itself."""


class ConnectionLost(ConnectionError):
    """The stream ended without a reason that would forbid another."""


class Stream:
    """The frames of one call.

    Args:
        call: of gRPC.
    """

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call
        self._turn = asyncio.Lock()

    async def read(self) -> tuple[pb.ServerFrame, str]:
        """Returns the next frame and its kind.

        Raises:
            ConfigError: if the server's certificate is not what it must be.
            ConnectionLost: if there is none.
            Refused: if the bytes are no frame.
        """
        try:
            data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _lost(error) from None
        if data is grpc.aio.EOF:
            raise ConnectionLost("the server closed the stream")
        return read_frame(pb.ServerFrame, data)

    async def write(self, frame: bytes) -> None:
        """Writes a frame, and returns once the network has room for it.

        Raises:
            ConfigError: if the server's certificate is not what it must be.
            ConnectionLost: if there is nobody to read it.
        """
        async with self._turn:
            try:
                await self._call.write(frame)
            except grpc.aio.AioRpcError as error:
                raise _lost(error) from None
            except (grpc.aio.UsageError, asyncio.InvalidStateError):
                raise ConnectionLost("the stream has ended") from None


@asynccontextmanager
async def open_stream(section: ClientSection) -> AsyncIterator[Stream]:
    """Opens a stream with the keys as they are on disk now.

    Raises:
        ConfigError: if they cannot be used.
    """
    if section.insecure:
        channel = grpc.aio.insecure_channel(section.server, options=OPTIONS)
    else:
        credentials = client_credentials(section)
        channel = grpc.aio.secure_channel(section.server, credentials, options=OPTIONS)
    async with channel:
        yield Stream(channel.stream_stream(CONNECT)())


async def introduce(stream: Stream, hello: pb.Hello) -> pb.Welcome:
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
        raise refused(frame, kind)
    check_protocol(frame.welcome.protocol)
    if not 0.01 <= frame.welcome.heartbeat_seconds <= 3600:
        raise Refused("invalid-frame", "Expected a heartbeat of 0.01 to 3600 s.")
    return frame.welcome


async def beat(stream: Stream, seconds: float) -> None:
    """Shows that the client lives."""
    heartbeat = pb.ClientFrame(heartbeat=pb.Heartbeat()).SerializeToString()
    while True:
        await asyncio.sleep(seconds)
        await stream.write(heartbeat)


async def unless_lost(speaking: Coroutine[Any, Any, None]) -> None:
    """Speaks; on a lost connection it waits, since the reader may know the reason."""
    with suppress(ConnectionLost):
        await speaking
    await asyncio.Event().wait()


def refused(frame: pb.ServerFrame, kind: str) -> Refused:
    """Returns why the conversation ends: the server says so, or makes no sense."""
    if kind != "refusal":
        return Refused("invalid-frame", f"Expected no {kind} at this point.")
    code = printable(frame.refusal.code, _QUOTED)
    reason = printable(frame.refusal.reason, _QUOTED)
    return Refused(code, f"The server refused this client ({code}): {reason}")


def _lost(error: grpc.aio.AioRpcError) -> ConnectionLost | ConfigError:
    """Returns why there is no connection: for now, or because the keys do not match."""
    reason = printable(f"{error.code().name}: {error.details()}", _QUOTED)
    if any(words in reason for words in _IMPROPER):
        return ConfigError(
            "Expected a server's certificate of the authority in [client] ca, for the "
            f"host in [client] server, got another one: {reason}"
        )
    return ConnectionLost(reason)
