"""What travels between client and server, and by which rules; no sockets here.

``fleet.proto`` has the frames and their order on a stream. A Flower message travels as
its own bytes, cut into chunks, so that neither side ever takes more memory for a frame
than a chunk, nor for a message than it has agreed to.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from flwr.app import Message
from google.protobuf.message import DecodeError

from client import fleet_pb2 as pb
from client.flower import from_bytes
from client.outline import check_outline
from fedpeft.errors import InvalidPayload, RunError

PROTOCOL = (1, 0)
"""Major and minor version of what both sides say."""

CHUNK_BYTES = 1 << 20
FRAME_BYTES = CHUNK_BYTES + 1024
"""No frame is longer; gRPC refuses one before it takes the memory."""

MESSAGE_ID_CHARACTERS = 64
QUOTED_CHARACTERS = 100
HELLO_SECONDS = 10.0
"""That the other side may take for its first word."""

CONNECT = "/fedpeft.v1.Federation/Connect"

RefusalCode = Literal[
    "unknown-client",
    "name-mismatch",
    "protocol-version",
    "plan-not-accepted",
    "too-large",
    "invalid-frame",
    "superseded",
    "no-slot",
]
"""All that a server says about why it ends a stream; see :class:`Refused`.

Not, or no longer, on the allow list; the claimed name is not the certificate's; another
protocol; another plan than the server's; a longer message than is due; bytes that are
no frame, or not here; the same client has connected anew; all clients are there.
"""

Frame = TypeVar("Frame", pb.ClientFrame, pb.ServerFrame)


class Refused(RunError):
    """The end of a stream, with its reason.

    Args:
        code: of the fixed list; a newer server's may be another.
        reason: for a human; nothing of a client's data.
    """

    def __init__(self, code: RefusalCode | str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Arrival:
    """A whole message.

    Attributes:
        message_id: the request's, in both directions.
        data: None if nobody waited for it.
    """

    message_id: str
    data: bytearray | None


class Assembler:
    """Puts the messages of one stream together, one at a time.

    **Guarantees**: memory is what has arrived of a message that is kept, at most
    `limit` bytes, however many were announced; every chunk brings a message nearer to
    its end, so none goes on for ever.

    Args:
        limit: bytes of a message.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._message_id = ""
        self._data: bytearray | None = None
        self._size = 0
        self._filled = 0

    def begin(self, begin: pb.Begin, *, keep: bool) -> None:
        """Starts a message.

        Args:
            begin: as received.
            keep: False to read it to its end and throw it away.

        Raises:
            Refused: if it is too long, has no name, or one is still under way.
        """
        if begin.size > self._limit:
            raise Refused(
                "too-large",
                f"Expected a message of at most {self._limit} bytes, got one of "
                f"{begin.size} announced.",
            )
        if self._size:
            raise _invalid("a message begun before the one before it was whole")
        if not (begin.size and 0 < len(begin.message_id) <= MESSAGE_ID_CHARACTERS):
            raise _invalid("a message without a size or a proper id")
        self._message_id, self._size, self._filled = begin.message_id, begin.size, 0
        self._data = bytearray() if keep else None

    def add(self, chunk: pb.Chunk) -> Arrival | None:
        """Takes the next part; returns the message once it is whole.

        Raises:
            Refused: if the part is empty, or more than was announced.
        """
        end = self._filled + len(chunk.data)
        if not self._filled < end <= self._size:
            raise _invalid("a chunk that is empty, or more than was announced")
        if self._data is not None:
            self._data += chunk.data
        self._filled = end
        if end < self._size:
            return None
        arrival = Arrival(self._message_id, self._data)
        self._data, self._size, self._filled = None, 0, 0
        return arrival


def cut(kind: type[Frame], message_id: str, data: bytes) -> Iterator[bytes]:
    """Yields the frames of a message, serialised one by one as they are asked for."""
    begin = pb.Begin(message_id=message_id, size=len(data))
    yield kind(begin=begin).SerializeToString()
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = pb.Chunk(data=data[start : start + CHUNK_BYTES])
        yield kind(chunk=chunk).SerializeToString()


def read_frame(kind: type[Frame], data: bytes) -> tuple[Frame, str]:
    """Parses a frame; returns it and which of its kinds it is.

    Raises:
        Refused: if the bytes are no such frame.
    """
    try:
        frame = kind.FromString(data)
    except DecodeError:
        raise _invalid(f"{len(data)} other bytes") from None
    which = frame.WhichOneof("kind")
    if which is None:
        raise _invalid("none of the known kinds")
    return frame, which


def read_message(data: bytes | bytearray) -> Message:
    """Reads a Flower message that came from outside.

    Takes as long as its bytes take to copy: not in an event loop.

    Raises:
        InvalidPayload: for bytes that are none, in whatever way Flower notices.
    """
    check_outline(data)
    try:
        return from_bytes(data)
    except Exception as error:
        kind = type(error).__name__
        raise InvalidPayload(f"Expected a message, got other bytes ({kind}).") from None


def quoted(text: str) -> str:
    r"""Returns what the other side wrote as one line of at most 100 plain letters.

    >>> quoted("two\nlines")
    'two\\nlines'
    """
    return ascii(text[:QUOTED_CHARACTERS])[1:-1][:QUOTED_CHARACTERS]


def our_protocol() -> pb.Protocol:
    """Returns the version that this side speaks, as a frame has it."""
    return pb.Protocol(major=PROTOCOL[0], minor=PROTOCOL[1])


def check_protocol(theirs: pb.Protocol) -> None:
    """Compares the other side's version: one minor version apart works.

    Raises:
        Refused: with both versions.
    """
    major, minor = PROTOCOL
    if theirs.major != major or abs(theirs.minor - minor) > 1:
        raise Refused(
            "protocol-version",
            f"Expected protocol {major}.{minor} or one minor version beside it, got "
            f"{theirs.major}.{theirs.minor}: upgrade the older side.",
        )


def _invalid(what: str) -> Refused:
    return Refused("invalid-frame", f"Expected a frame that is due here, got {what}.")
