"""Who is passed over when a cohort is chosen, and what a stop leaves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.messages import TrainReply, TrainRequest
from fedpeft.compression import Dense
from fedpeft.errors import RunError
from fedpeft.interfaces import Payload
from fedpeft.privacy import make_plan
from fedpeft.tensors import flatten, scale, unflatten
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


def test_three_failures_in_a_row_set_a_client_aside_for_longer_each_time(
    tmp_path: Path,
) -> None:
    connections = {0: 1}
    runtime = Runtime(connections=lambda: dict(connections))
    standing = Standing(tmp_path / "standing.json")
    for server_round, code in enumerate(("failed", "silent", "ok", "failed"), 1):
        standing.ask(server_round, [0])
        standing.note({0: code}, runtime)
    standing.ask(5, [0])
    standing.note({0: "silent"}, runtime)
    assert standing.passed_over(6, runtime) == set()  # the third was an answer
    standing.ask(6, [0])
    standing.note({0: "budget-spent"}, runtime)
    assert standing.passed_over(8, runtime) == {0}  # two rounds, and a connection
    connections[0] = 2
    assert standing.passed_over(7, runtime) == {0}
    assert standing.passed_over(8, runtime) == set()
    standing.ask(8, [0])
    standing.note({0: "failed"}, runtime)  # it had one chance
    connections[0] = 3
    assert standing.passed_over(11, runtime) == {0}  # four rounds, now
    assert standing.passed_over(12, runtime) == set()


def test_another_process_knows_whom_the_round_has_asked_and_who_failed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "standing.json"
    standing = Standing(path)
    assert standing.ask(7, [0, 1]) == {0, 1}
    standing.note({0: "silent", 1: "ok"}, Runtime())
    for _ in range(2):
        standing = Standing(path)
        assert standing.ask(7, [0, 2]) == {0, 1, 2}
        standing.note({0: "silent", 2: "ok"}, Runtime())
    assert Standing(path).passed_over(8, Runtime()) == {0}
    assert Standing(path).ask(8, [3]) == {3}


@pytest.mark.parametrize("text", ["{", "{}", '{"round": 1, "asked": [], "clients": 3}'])
def test_a_damaged_file_is_not_guessed(tmp_path: Path, text: str) -> None:
    (tmp_path / "standing.json").write_text(text)
    with pytest.raises(RunError, match="restore it"):
        Standing(tmp_path / "standing.json")


@pytest.mark.parametrize(
    ("clients", "size", "rounds"), [(20, 6, 60), (5, 3, 10), (4, 3, 20), (10, 5, 40)]
)
def test_a_client_that_never_comes_does_not_end_the_run_it_is_missing_from(
    server, start, clients: int, size: int, rounds: int
) -> None:
    config = small_run(
        f"partition.num_clients={clients}",
        f"cohort.size={size}",
        f"run.rounds={rounds}",
        "run.evaluate_every=1000",
    )
    grid = HandMadeGrid(clients, lambda c, r: _same(r, start.trainable) if c else None)
    # With a plan: its cap is what runs out if others take over.
    server = replace(server, config=config, plan=make_plan(config))
    assert run_rounds(grid, server, start).server_round == rounds


def test_updates_that_no_number_can_hold_are_left_out(server, start) -> None:
    def reply(client: int, request: TrainRequest) -> TrainReply:
        if client:
            return _same(request, start.trainable)
        size = flatten(start.trainable).numel()
        huge = unflatten(torch.full((size,), 3e38), start.trainable)
        return TrainReply("ok", Dense().compress(huge, torch.Generator()).to_bytes())

    progress = run_rounds(HandMadeGrid(4, reply), server, start)
    assert progress.records[0]["codes"] == {"invalid-payload": 1}
    assert flatten(progress.trainable).isfinite().all()


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
