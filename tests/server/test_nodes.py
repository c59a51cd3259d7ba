from collections.abc import Iterable
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from client.flower import set_identity
from client.messages import TrainReply
from fedpeft.errors import RunError
from server import nodes
from server.checkpoint import Progress
from server.exchange import exchange, request_to
from server.nodes import find_nodes
from server.runtime import Runtime
from server.setup import Server
from simulations.grid import InProcessGrid

SUPERLINK = 1
"""The node from which Flower answers for nodes that are gone."""


class FlowerNodes(InProcessGrid):
    """Nodes of random numbers; `says` is what each of them answers, None an error."""

    def __init__(self, says: dict[int, int | None], *, late: int = 0) -> None:
        self.says = says
        self._late = late  # looks at the nodes before the last of them is there

    def get_node_ids(self) -> list[int]:
        self._late -= 1
        return list(self.says) if self._late < 0 else list(self.says)[:-1]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        index = self.says[message.metadata.dst_node_id]
        if index is None:
            return Message(Error(code=5, reason="gone"), reply_to=message)
        record = RecordDict({"client": ConfigRecord({"index": index})})
        if message.metadata.message_type == "train":
            record = TrainReply("failed").to_record()
        return Message(record, reply_to=message)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "POLL_SECONDS", 0.01)
    set_identity()


def test_nodes_stand_in_the_order_of_their_clients() -> None:
    assert find_nodes(FlowerNodes({70: 2, 80: 0, 90: 1}), 3, 1.0) == [80, 90, 70]


def test_nodes_that_come_late_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    assert find_nodes(FlowerNodes({70: 1, 80: 0}, late=2), 2, 10.0) == [80, 70]
    assert caplog.messages == ["waiting for 2 nodes, 1 are there"]


def test_a_wait_has_an_end() -> None:
    with pytest.raises(RunError, match=r"Expected 2 nodes.* got 1: start as many"):
        find_nodes(FlowerNodes({70: 0}), 2, 0.05)


def test_more_nodes_than_clients_are_refused() -> None:
    with pytest.raises(RunError, match=r"Expected 1 nodes.* got 2"):
        find_nodes(FlowerNodes({70: 0, 80: 1}), 1, 1.0)


def test_two_nodes_cannot_be_one_client() -> None:
    with pytest.raises(RunError, match="got 0 twice"):
        find_nodes(FlowerNodes({70: 0, 80: 0}), 2, 1.0)


@pytest.mark.parametrize("other", [None, 2, -1])
def test_every_client_must_be_somewhere(other: int | None) -> None:
    with pytest.raises(RunError, match="partition-id 0 to 1, got answers from"):
        find_nodes(FlowerNodes({70: 0, 80: other}), 2, 1.0)


def test_what_flower_says_of_a_node_that_is_gone_is_no_answer(
    server: Server, start: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = FlowerNodes({70: 1, 80: 0})
    server = replace(server, runtime=Runtime(nodes=[80, 70]))
    requests = {c: request_to(server, start, 1, c, b"") for c in (0, 1)}
    assert exchange(grid, server, requests).keys() == {0, 1}
    answer = grid._answer

    def gone(message: Message) -> Message:
        reply = answer(message)
        if message.metadata.dst_node_id == 80:
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK
        return reply

    monkeypatch.setattr(grid, "_answer", gone)
    assert exchange(grid, server, requests).keys() == {1}
