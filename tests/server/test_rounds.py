"""The loop against clients made by hand: no network, no training."""

from dataclasses import replace

import pytest
import torch
from flwr.app import Error

from client.messages import TrainReply, TrainRequest
from fedpeft.compression import Dense
from fedpeft.errors import RunError
from fedpeft.interfaces import Payload
from fedpeft.tensors import flatten, scale
from server.checkpoint import load_checkpoint
from server.rounds import final_state, run_rounds
from tests.server.conftest import HandMadeGrid, small_run


def _update(state: bytes, template: dict, factor: float) -> TrainReply:
    """An update that is `factor` times the state that was sent."""
    sent = Dense().decompress(Payload.from_bytes(state), template)
    payload = Dense().compress(scale(sent, factor), torch.Generator())
    return TrainReply("ok", payload.to_bytes(), ledger_length=1, ledger_head="h")


def test_the_mean_is_added_whatever_the_order_of_arrival(server, start) -> None:
    before = flatten(start.trainable)

    def reply(client: int, request: TrainRequest) -> TrainReply:
        return _update(request.state, start.trainable, float(client))

    server = replace(server, config=small_run("run.rounds=1"))
    grid = HandMadeGrid(4, reply)
    progress = run_rounds(grid, server, start)
    assert torch.allclose(flatten(progress.trainable), before * (1 + 1.5))
    assert progress.records[0]["replies"] == 4
    assert progress.acknowledged == dict.fromkeys(range(4), (1, "h"))


def test_what_was_acknowledged_is_sent_back(server, start) -> None:
    grid = HandMadeGrid(4, lambda c, r: _update(r.state, start.trainable, 0.0))
    run_rounds(grid, server, start)
    first, second = grid.requests[0][1], grid.requests[-1][1]
    assert (first.ledger_length, second.ledger_length) == (0, 1)
    assert second.ledger_head == "h"
    # The key of an answer does not depend on acknowledgements.
    assert replace(second, ledger_length=9, durable_round=9).hash == second.hash
    assert replace(second, server_round=9).hash != second.hash


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (TrainReply("budget-spent"), "2 budget-spent"),
        (TrainReply("ok", b"junk"), "2 invalid-payload"),
        (Error(3, "crashed"), "2 failed"),
        (None, "2 silent"),
    ],
)
def test_too_few_replies_stop_the_run_with_the_reason(
    server, start, bad, reason
) -> None:
    before = flatten(start.trainable)

    def reply(client: int, request: TrainRequest):
        if client < 2:
            return bad
        return _update(request.state, start.trainable, 1.0)

    with pytest.raises(RunError, match=f"at least 2.4 of 4 .*{reason}"):
        run_rounds(HandMadeGrid(4, reply), server, start)
    assert torch.equal(flatten(start.trainable), before)
    assert not (server.output / "events.jsonl").exists()


def test_one_bad_reply_of_four_is_counted_and_left_out(server, start) -> None:
    before = flatten(start.trainable)

    def reply(client: int, request: TrainRequest):
        if client == 0:
            return TrainReply("ok", b"junk")
        return _update(request.state, start.trainable, 1.0)

    server = replace(server, config=small_run("run.rounds=1"))
    progress = run_rounds(HandMadeGrid(4, reply), server, start)
    assert torch.allclose(flatten(progress.trainable), 2 * before)
    assert progress.records[0]["failures"] == 1


def test_the_final_model_is_the_mean_of_the_last_rounds(server, start) -> None:
    config = small_run("run.rounds=3", "run.average_last=2")
    before = flatten(start.trainable)
    grid = HandMadeGrid(4, lambda c, r: _update(r.state, start.trainable, 1.0))
    progress = run_rounds(grid, replace(server, config=config), start)
    # States double: 2, 4, 8 times the first; the mean of the last two is 6.
    final = flatten(final_state(progress, config))
    assert torch.allclose(final, 6 * before)


def test_a_run_goes_on_from_its_checkpoint(server, start) -> None:
    grid = HandMadeGrid(4, lambda c, r: _update(r.state, start.trainable, 1.0))
    run_rounds(grid, server, start)
    loaded = load_checkpoint(server.output / "checkpoint", server.config.hash)
    assert loaded.server_round == 2
    assert loaded.records == start.records
    for name, tensor in start.trainable.items():
        assert torch.equal(loaded.trainable[name], tensor)
    with pytest.raises(RunError, match="a changed one"):
        load_checkpoint(server.output / "checkpoint", "another hash")
