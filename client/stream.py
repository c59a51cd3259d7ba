"""One stream to the server, as the client's event loop reads and writes it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from client import fleet_pb2 as pb
from client.settings import ClientSection
from client.tls import client_credentials
from client.wire import CONNECT, FRAME_BYTES, read_frame
from fedpeft.errors import ConfigError

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


def _lost(error: grpc.aio.AioRpcError) -> ConnectionLost:
    return ConnectionLost(one_line(f"{error.code().name}: {error.details()}"))


def one_line(text: str) -> str:
    """Returns what the other side says as one line of bearable length.

    >>> one_line("no   way")
    'no way'
    """
    return " ".join(text.split())[:300]
