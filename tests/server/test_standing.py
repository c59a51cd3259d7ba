"""Who is passed over when a cohort is chosen, and what a stop leaves."""

from dataclasses import replace

import pytest
import torch

from client.messages import TrainReply, TrainRequest
from fedpeft.compression import Dense
from fedpeft.errors import RunError
from fedpeft.interfaces import Payload
from fedpeft.tensors import flatten, scale
from server.rounds import run_rounds
from server.runtime import Runtime
from server.standing import Standing
from tests.server.conftest import HandMadeGrid, small_run


def _same(request: TrainRequest, template: dict) -> TrainReply:
    sent = Dense().decompress(Payload.from_bytes(request.state), template)
    payload = Dense().compress(scale(sent, 0.0), torch.Generator())
    return TrainReply("ok", payload.to_bytes())


def _asked(grid: HandMadeGrid, server_round: int) -> list[int]:
    return sorted(c for c, r in grid.requests if r.server_round == server_round)


def test_three_failures_in_a_row_set_a_client_aside_until_it_connects_anew() -> None:
    connections = {0: 1, 1: 1}
    runtime = Runtime(connections=lambda: dict(connections))
    standing = Standing()
    for code in ("failed", "silent", "ok", "failed", "silent"):
        standing.note({0: code, 1: "ok"}, runtime)
    assert standing.passed_over(runtime) == set()  # the third was an answer
    standing.note({0: "budget-spent", 1: "ok"}, runtime)
    assert standing.passed_over(runtime) == {0}
    connections[0] = 2
    assert standing.passed_over(runtime) == set()
    standing.note({0: "failed"}, runtime)
    assert standing.passed_over(runtime) == set()  # it counts from the start again


def test_the_next_in_the_rotation_take_the_places_of_the_busy(server, start) -> None:
    config = small_run("cohort.size=2", "cohort.min_reply_share=1.0")
    runtime = Runtime(busy=lambda: {1})
    server = replace(server, config=config, runtime=runtime)
    grid = HandMadeGrid(4, lambda c, r: _same(r, start.trainable))
    progress = run_rounds(grid, server, start)
    assert _asked(grid, 1) == [0, 2]
    assert _asked(grid, 2) == [2, 3]
    assert [record["replies"] for record in progress.records] == [2, 2]


def test_too_few_that_can_be_asked_stop_the_run(server, start) -> None:
    runtime = Runtime(busy=lambda: {0, 1, 2})
    grid = HandMadeGrid(4, lambda c, r: _same(r, start.trainable))
    with pytest.raises(RunError, match=r"got 1 \(3 not asked: busy, set aside or"):
        run_rounds(grid, replace(server, runtime=runtime), start)


def test_a_client_that_fails_three_rounds_is_not_asked_in_the_fourth(
    server, start
) -> None:
    config = small_run("run.rounds=4")
    server = replace(server, config=config)

    def reply(client: int, request: TrainRequest) -> TrainReply:
        if client == 3:
            return TrainReply("failed")
        return _same(request, start.trainable)

    grid = HandMadeGrid(4, reply)
    progress = run_rounds(grid, server, start)
    assert _asked(grid, 3) == [0, 1, 2, 3]
    assert _asked(grid, 4) == [0, 1, 2]
    assert progress.records[0]["codes"] == {"failed": 1}
    assert progress.records[3]["codes"] == {}


def test_late_answers_are_counted_in_the_round_in_which_they_come(
    server, start
) -> None:
    late = iter([0, 2, 2, 2])
    server = replace(server, runtime=Runtime(late=lambda: next(late)))
    grid = HandMadeGrid(4, lambda c, r: _same(r, start.trainable))
    progress = run_rounds(grid, server, start)
    assert [record["codes"] for record in progress.records] == [{"late": 2}, {}]


def test_a_stop_ends_the_round_and_the_next_start_goes_on(server, start) -> None:
    stops = iter([False, True])
    stopping = replace(server, runtime=Runtime(should_stop=lambda: next(stops)))
    grid = HandMadeGrid(4, lambda c, r: _same(r, start.trainable))
    progress = run_rounds(grid, stopping, start)
    assert progress.server_round == 1
    assert (server.output / "checkpoint" / "round-000001.safetensors").exists()
    assert run_rounds(grid, server, progress).server_round == 2


def test_the_watcher_hears_of_the_start_and_of_every_round(server, start) -> None:
    seen: list[int] = []
    runtime = Runtime(watch=lambda progress: seen.append(progress.server_round))
    grid = HandMadeGrid(4, lambda c, r: _same(r, start.trainable))
    run_rounds(grid, replace(server, runtime=runtime), start)
    assert seen == [0, 1, 2]
    assert torch.isfinite(flatten(start.trainable)).all()
