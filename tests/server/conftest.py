"""A server, a start and a grid made by hand: no network, no training."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message

from client.flower import set_identity
from client.messages import TrainRequest
from fedpeft.aggregation import Mean
from fedpeft.compression import Dense
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.model import TaskModel, trainable_state
from fedpeft.peft import Head
from fedpeft.privacy import SeededRandomness
from fedpeft.tasks import TextClassification
from fedpeft.tensors import zeros_like
from server.checkpoint import Progress
from server.setup import Server
from simulations.grid import InProcessGrid
from tests.helpers import small_config, toy, toy_batch


class HandMadeGrid(InProcessGrid):
    """Answers requests with `reply(client, request)`, in reverse order."""

    def __init__(self, num_clients: int, reply) -> None:
        self._num_clients = num_clients
        self._reply = reply
        self.requests: list[tuple[int, TrainRequest]] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in reversed(list(messages)):
            client = message.metadata.dst_node_id - 1
            request = TrainRequest.from_record(message.content)
            self.requests.append((client, request))
            reply = self._reply(client, request)
            if reply is None:
                continue
            if isinstance(reply, Error):
                replies.append(Message(reply, reply_to=message))
            else:
                replies.append(Message(reply.to_record(), reply_to=message))
        return replies


def small_run(*overrides: str) -> RunConfig:
    path = Path("reviews.csv")
    return small_config(path, "cohort.size=4", "run.rounds=2", *overrides)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    case = toy(Head())
    task = TextClassification(SimpleNamespace(pad_token_id=0), 32)
    model = TaskModel(case.model, case.operations, task, "fingerprint", {})
    ids, _, labels = toy_batch(4)
    return Server(
        run="0123456789abcdef",
        config=small_run(),
        plan=None,
        model=model,
        aggregator=Mean(),
        compressor=Dense(),
        held_out=Encoded(list(ids), labels),
        output=tmp_path,
        randomness=SeededRandomness,
    )


@pytest.fixture
def start(server: Server) -> Progress:
    set_identity()
    state = trainable_state(server.model)
    return Progress(0, state, {}, zeros_like(state))
