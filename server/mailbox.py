"""Requests that wait for their answers; every one is answered once, or withdrawn."""

import asyncio
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import Error, Message

from client.flower import set_message_id
from client.wire import Arrival, read_message
from fedpeft.errors import InvalidPayload

_REMEMBERED = 4096
"""Withdrawn requests whose late answers are still called late."""

_UNKNOWN = 0
"""Flower's code of an error that it has no other for."""


@dataclass
class Request:
    """One message to one client.

    Attributes:
        message_id: of the message; its answer bears it too.
        client: index of the client.
        message: what is asked; None once it is answered, to be rid of its memory.
        answered: holds the answer.
    """

    message_id: str
    client: int
    message: Message | None
    answered: asyncio.Future[Message] = field(repr=False)


class Mailbox:
    """The requests of all clients, connected or not; for one event loop.

    **Guarantees**: memory does not grow with the number of requests that were ever
    made, nor with what clients send.

    Attributes:
        counts: answers that nobody waited for: ``late`` (the request was withdrawn),
            ``duplicate`` (it had its answer), ``unknown`` (it was an earlier process's,
            or nobody's).
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._series = secrets.token_hex(8)
        self._number = 0
        self._requests: dict[str, Request] = {}
        self._withdrawn: dict[str, int] = {}

    def post(self, message: Message) -> Request:
        """Takes a message and names it."""
        self._number += 1
        message_id = f"{self._series}-{self._number}"
        set_message_id(message, message_id)
        client = message.metadata.dst_node_id - 1
        answered = asyncio.get_running_loop().create_future()
        request = Request(message_id, client, message, answered)
        self._requests[message_id] = request
        return request

    def find(self, client: int, message_id: str) -> Request | None:
        """Returns a client's request if it still waits for its answer."""
        request = self._requests.get(message_id)
        if request is None or request.client != client or request.message is None:
            return None
        return request

    def waiting(self, client: int) -> list[Request]:
        """Returns a client's requests without an answer, oldest first."""
        requests = self._requests.values()
        return [r for r in requests if r.client == client and r.message is not None]

    def is_withdrawn(self, client: int, message_id: str) -> bool:
        """Whether a client was asked this, and nobody waits for it any more."""
        return self._withdrawn.get(message_id) == client

    async def answer(self, client: int, arrival: Arrival) -> bool:
        """Hands a request its answer; whether anybody waited for it.

        What is no answer counts as one all the same, an error: who was asked once more
        would send it once more.

        Raises:
            InvalidPayload: if the bytes are no message, or another's answer.
        """
        request = self.find(client, arrival.message_id)
        if request is None or arrival.data is None:
            return False
        try:
            reply = await asyncio.to_thread(_read, request, arrival.data)
        except InvalidPayload as error:
            if request.message is not None:
                reason = Error(_UNKNOWN, f"invalid answer: {error}")
                self._settle(request, Message(reason, reply_to=request.message))
            raise
        return self._settle(request, reply)

    def _settle(self, request: Request, reply: Message) -> bool:
        """Ends a request's wait, unless it ended while its answer was read."""
        if request.answered.done():
            return False
        request.message = None
        request.answered.set_result(reply)
        return True

    def discard(self, client: int, message_id: str) -> str:
        """Counts an answer that nobody waits for; returns as what."""
        if self.is_withdrawn(client, message_id):
            del self._withdrawn[message_id]
            kind = "late"
        else:
            ours = message_id.startswith(f"{self._series}-")
            kind = "duplicate" if ours else "unknown"
        self.counts[kind] += 1
        return kind

    async def wait(self, message_ids: Iterable[str], timeout: float | None) -> None:
        """Returns once all requests have their answers, or after so many seconds."""
        answers = [self._requests[message_id].answered for message_id in message_ids]
        if answers:
            await asyncio.wait(answers, timeout=timeout)

    def take(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the answers that are there; each is given once."""
        replies = []
        for message_id in message_ids:
            request = self._requests.get(message_id)
            if request is not None and request.answered.done():
                del self._requests[message_id]
                if not request.answered.cancelled():
                    replies.append(request.answered.result())
        return replies

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Forgets requests; those without an answer will have a late one, or none."""
        for message_id in message_ids:
            request = self._requests.pop(message_id, None)
            if request is not None and request.message is not None:
                request.answered.cancel()
                self._withdrawn[message_id] = request.client
        while len(self._withdrawn) > _REMEMBERED:
            del self._withdrawn[next(iter(self._withdrawn))]

    def close(self) -> None:
        """Ends every wait."""
        for request in self._requests.values():
            request.answered.cancel()


def _read(request: Request, data: bytearray) -> Message:
    """Reads a request's answer; in a thread, since a large one takes its time."""
    reply = read_message(data)
    claimed = reply.metadata.src_node_id, reply.metadata.reply_to_message_id
    if claimed != (request.client + 1, request.message_id):
        raise InvalidPayload("Expected the answer to this request, got another.")
    return reply
