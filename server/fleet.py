"""The gRPC service: who may come in, what is sent, what is kept of what arrives.

One event loop serves all streams. On each of them a reader and a writer run side by
side; the first to end ends the stream.
"""

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from flwr.app import Message

from client import fleet_pb2 as pb
from client.agreement import Proposal
from client.flower import to_bytes
from client.racing import first_of
from client.wire import (
    HELLO_SECONDS,
    Arrival,
    Assembler,
    Refused,
    cut,
    our_protocol,
    quoted,
)
from fedpeft import __version__
from fedpeft.errors import InvalidPayload
from server.door import Door
from server.link import Link
from server.mailbox import Mailbox
from server.turns import Turns

logger = logging.getLogger(__name__)

MISSED_HEARTBEATS = 3
SENDERS = 4
"""Requests held serialised at once: each copy is as large as its message."""

UNREADY_STREAMS = 2
"""Of one client: one that loads its model, and one that only looks at the proposal."""

UNASKED_ANSWERS = 100
"""After which a stream ends: a client in good faith has a few, of an earlier server."""

TURN_SECONDS = 1.0
"""After which a request is sent though slow clients hold all turns."""


class Fleet:
    """All clients, as the server's event loop sees them.

    Attributes:
        mailbox: what they are asked.
        connections: client -> how often it has connected and become ready.
        told: the clients that know that the run is complete.

    Args:
        proposal: what every client must have accepted.
        door: who may come in; asked again at every heartbeat.
        max_reply_bytes: a longer answer is refused before any of it is kept.
        heartbeat_seconds: between a client's signs of life.
    """

    def __init__(
        self,
        proposal: Proposal,
        door: Door,
        *,
        max_reply_bytes: int,
        heartbeat_seconds: float,
    ) -> None:
        self.mailbox = Mailbox()
        self.connections: dict[int, int] = {}
        self.told: set[int] = set()
        self._is_complete = False
        self._proposal = proposal
        self._door = door
        self._max_reply_bytes = max_reply_bytes
        self._heartbeat_seconds = heartbeat_seconds
        self._streams: dict[Link, None] = {}  # oldest first
        self._links: dict[int, Link] = {}  # of those that are ready
        self._turns = Turns(SENDERS, TURN_SECONDS)

    @property
    def links(self) -> list[Link]:
        """Those that are ready; may be read from any thread, since it is one step."""
        return list(self._links.values())

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Has messages sent as soon as their clients are ready; returns their ids."""
        message_ids = []
        for message in messages:
            request = self.mailbox.post(message)
            message_ids.append(request.message_id)
            link = self._links.get(request.client)
            if link is not None:
                link.outbox.put_nowait(request.message_id)
        return message_ids

    async def exchange(
        self, messages: Iterable[Message], timeout: float | None
    ) -> list[Message]:
        """Sends messages and returns the answers that come in time."""
        message_ids = self.push(messages)
        await self.mailbox.wait(message_ids, timeout)
        replies = self.mailbox.take(message_ids)
        self.mailbox.withdraw(message_ids)
        return replies

    def finish(self) -> None:
        """Tells every client that the run is complete, now or when it comes."""
        self._is_complete = True
        for link in self._streams:
            link.dismiss(None)

    async def connect(self, _: object, context: Any) -> None:
        """Serves one stream, from Hello to its end."""
        link = Link(context, MISSED_HEARTBEATS * self._heartbeat_seconds)
        try:
            await self._admit(link)
            await first_of(self._welcome(link), link.dismissed())
            if self._is_complete:
                link.dismiss(None)
            is_over = await first_of(
                self._listen(link), self._send(link), link.dismissed()
            )
            if is_over:
                last = pb.ServerFrame(finished=pb.Finished())
                try:
                    await link.end(last, wait=True)
                finally:  # a client that leaves cancels this
                    self.told.add(link.client)
        except Refused as refused:
            self._note(link, refused)
            refusal = pb.Refusal(code=refused.code, reason=str(refused))
            await link.end(pb.ServerFrame(refusal=refusal))
        except TimeoutError:
            self._log(logging.WARNING, link, "silent for too long: its stream ends")
        except (ConnectionError, EOFError):
            self._log(logging.INFO, link, "connection lost")
        finally:
            self._streams.pop(link, None)
            if self._links.get(link.client) is link:
                del self._links[link.client]
            if link.is_ready:
                self._log(logging.INFO, link, "left")

    async def _admit(self, link: Link) -> None:
        """Reads Hello and admits or refuses the client.

        Of its streams that are not ready the oldest end if they are too many.

        Raises:
            Refused: if this is nobody who may come in.
            EOFError: if it leaves without a word.
        """
        frame, kind = await link.read(HELLO_SECONDS)
        if kind != "hello":
            raise Refused("invalid-frame", f"Expected Hello first, got {kind}.")
        self._door.admit(link, frame.hello)
        self._streams[link] = None
        same = [s for s in self._streams if s.name == link.name and not s.is_ready]
        for earlier in same[:-UNREADY_STREAMS]:
            earlier.dismiss(_superseded())

    async def _welcome(self, link: Link) -> bool:
        """Proposes the run; returns that it is not over."""
        welcome = pb.Welcome(
            protocol=our_protocol(),
            software=__version__,
            client=link.client,
            run=self._proposal.run,
            toml=self._proposal.toml,
            backbone=self._proposal.backbone,
            heartbeat_seconds=self._heartbeat_seconds,
        )
        await link.write(pb.ServerFrame(welcome=welcome).SerializeToString())
        return False

    async def _listen(self, link: Link) -> bool:
        """Reads frames until the client has no more; returns False then."""
        assembler = Assembler(self._max_reply_bytes)
        with contextlib.suppress(EOFError):
            while True:
                # Not here: what a loop last held, it would hold while it waits.
                await self._hear(link, assembler, *await link.read())
        return False

    async def _hear(
        self, link: Link, assembler: Assembler, frame: pb.ClientFrame, kind: str
    ) -> None:
        """Takes in one frame.

        Raises:
            Refused: if it is not due, or comes from a client that was revoked.
        """
        if kind != "chunk":
            self._door.check(link)
        if kind == "chunk" and link.is_ready:
            arrival = assembler.add(frame.chunk)
            if arrival is not None:
                await self._take_in(link, arrival)
        elif kind == "begin" and link.is_ready:
            request = self.mailbox.find(link.client, frame.begin.message_id)
            assembler.begin(frame.begin, keep=request is not None)
        elif kind == "received" and not link.is_ready:
            self._recognise(link, frame.received.message_id)
        elif kind == "ready" and not link.is_ready:
            self._make_ready(link, frame.ready)
        elif kind != "heartbeat":
            raise Refused("invalid-frame", f"Expected no {kind} at this point.")

    def _recognise(self, link: Link, message_id: str) -> None:
        """Notes a request that the client has from an earlier connection."""
        asked = self.mailbox.find(link.client, message_id) is not None
        if asked or self.mailbox.is_withdrawn(link.client, message_id):
            link.at_work.add(message_id)

    def _make_ready(self, link: Link, ready: pb.Ready) -> None:
        """Starts to send what the client was asked and does not have yet.

        An earlier connection of the same client ends now and not before: one that only
        looks at the proposal disturbs nobody.
        """
        if ready.accepted != self._proposal.hash:
            raise Refused(
                "plan-not-accepted",
                f"Expected the plan {self._proposal.hash} accepted, got "
                f"'{quoted(ready.accepted)}'.",
            )
        earlier = self._links.get(link.client)
        if earlier is not None:
            earlier.dismiss(_superseded())
        self._links[link.client] = link
        link.is_ready = True
        self.connections[link.client] = self.connections.get(link.client, 0) + 1
        for request in self.mailbox.waiting(link.client):
            if request.message_id not in link.at_work:
                link.outbox.put_nowait(request.message_id)
        self._log(logging.INFO, link, "joined")

    async def _send(self, link: Link) -> bool:
        """Sends requests as they come."""
        while True:
            message_id = await link.outbox.get()
            async with self._turns.take():
                await self._deliver(link, message_id)

    async def _deliver(self, link: Link, message_id: str) -> None:
        """Sends a request, unless it was withdrawn before its turn came."""
        request = self.mailbox.find(link.client, message_id)
        if request is not None and request.message is not None:
            link.at_work.add(message_id)
            data = to_bytes(request.message)
            for frame in cut(pb.ServerFrame, message_id, data):
                await link.write(frame)

    async def _take_in(self, link: Link, arrival: Arrival) -> None:
        """Hands an answer to who waits for it, and tells the client that it is here."""
        try:
            is_answer = await self.mailbox.answer(link.client, arrival)
        except InvalidPayload as error:
            raise Refused("invalid-frame", str(error)) from None
        if not is_answer:
            self._drop(link, arrival.message_id)
        link.at_work.discard(arrival.message_id)
        received = pb.Received(message_id=arrival.message_id)
        await link.write(pb.ServerFrame(received=received).SerializeToString())

    def _drop(self, link: Link, message_id: str) -> None:
        """Counts an answer that nobody waits for.

        Raises:
            Refused: if it is one too many.
        """
        kind = self.mailbox.discard(link.client, message_id)
        is_late = kind == "late"  # there are no more of these than requests
        level = logging.INFO if is_late else logging.DEBUG
        self._log(level, link, f"{kind} answer dropped")
        link.unasked += not is_late
        if link.unasked >= UNASKED_ANSWERS:
            raise Refused(
                "invalid-frame",
                f"Expected answers to requests, got {link.unasked} to none.",
            )

    def _note(self, link: Link, refused: Refused) -> None:
        """Counts a refusal and says it in one line."""
        self.mailbox.counts[refused.code] += 1
        self._log(logging.WARNING, link, f"refused: {refused}", code=refused.code)

    def _log(self, level: int, link: Link, text: str, **extra: str) -> None:
        code = f" code={extra['code']}" if extra else ""
        about = {"run": self._proposal.run, "client": link.name, **extra}
        logger.log(level, "client=%s%s %s", link.name, code, text, extra=about)


def _superseded() -> Refused:
    return Refused("superseded", "This client has connected anew: two processes?")
