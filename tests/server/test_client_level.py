"""Rounds whose unit of privacy is the client: the server clips, noises and hides."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Error

from client.messages import TrainReply, TrainRequest
from fedpeft.compression import Dense
from fedpeft.errors import RunError
from fedpeft.interfaces import Payload
from fedpeft.privacy import PrivateMean, SeededRandomness, make_plan
from fedpeft.tensors import flatten, unflatten
from server.checkpoint import Progress, load_checkpoint
from server.cohort import SecretFile, drawn
from server.rounds import run_rounds
from server.setup import Server
from tests.helpers import small_config
from tests.server.conftest import HandMadeGrid

HIDDEN = ("cohort_size", "replies", "failures", "bytes_up", "bytes_down", "seconds")


def _client_level(*overrides: str):
    return small_config(
        Path("reviews.csv"), "privacy.unit=client", "run.rounds=2", *overrides
    )


def _ones(request: TrainRequest, template: dict) -> TrainReply:
    """An update of ones everywhere."""
    size = flatten(template).numel()
    payload = Dense().compress(unflatten(torch.ones(size), template), torch.Generator())
    return TrainReply("ok", payload.to_bytes(), ledger_length=1, ledger_head="h")


@pytest.fixture
def secret(server: Server, start: Progress) -> tuple[Server, Progress]:
    """Poisson cohorts of two of four clients; the noise is left out, the norm is 1."""
    config = _client_level("cohort.sampling=poisson", "run.rounds=12")
    rule = PrivateMean(1.0, 0.0, 2.0, SeededRandomness)
    start.aggregator = rule.init(start.trainable)
    changed = replace(server, config=config, plan=make_plan(config), aggregator=rule)
    return changed, start


def test_the_sum_is_clipped_and_divided_by_the_nominal_cohort(secret) -> None:
    server, progress = secret
    before = flatten(progress.trainable)
    template = dict(progress.trainable)
    grid = HandMadeGrid(4, lambda c, r: _ones(r, template))
    run_rounds(grid, server, progress)
    # Each answer moves the model by its norm of 1, halved, in the direction of ones.
    moved = flatten(progress.trainable) - before
    expected = torch.ones_like(before) / before.numel() ** 0.5
    answers = len([1 for _, request in grid.requests if request.server_round])
    assert torch.allclose(moved, answers / 2 * expected, rtol=1e-4)


def test_who_answered_and_how_many_stays_with_the_server(secret) -> None:
    server, progress = secret
    template = dict(progress.trainable)
    grid = HandMadeGrid(4, lambda c, r: _ones(r, template))
    run_rounds(grid, server, progress)
    lines = (server.output / "events.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert all(json.loads(line)[key] is None for line in lines for key in HIDDEN)
    path = server.output / "server" / "secrets.jsonl"
    assert path.stat().st_mode & 0o077 == 0
    events = [json.loads(line) for line in path.read_text().splitlines()]
    cohorts = [event["cohort"] for event in events if "cohort" in event]
    asked = [client for client, request in grid.requests if request.server_round]
    assert sorted(asked) == sorted(client for cohort in cohorts for client in cohort)
    assert len({len(cohort) for cohort in cohorts}) > 1


def test_an_empty_cohort_is_a_round_of_noise(secret) -> None:
    server, progress = secret
    rule = PrivateMean(1.0, 3.0, 2.0, SeededRandomness)
    progress.aggregator = rule.init(progress.trainable)
    before = flatten(progress.trainable)
    config = _client_level("cohort.sampling=poisson", "run.rounds=1")
    secrets = SecretFile(server.output / "server" / "secrets.jsonl")
    secrets.note({"round": 1, "cohort": []})
    server = replace(server, config=config, aggregator=rule)
    grid = HandMadeGrid(4, lambda c, r: TrainReply("ok", b"enrolled", 1, "h"))
    run_rounds(grid, server, progress)
    moved = flatten(progress.trainable) - before
    assert progress.server_round == 1
    assert moved.std() == pytest.approx(1.5, rel=0.3)


def test_a_round_that_is_tried_again_asks_the_same_clients(secret) -> None:
    server, progress = secret
    template = dict(progress.trainable)

    def crash(client: int, request: TrainRequest):
        return Error(3, "crashed") if request.server_round else _ones(request, template)

    first = HandMadeGrid(4, crash)
    with pytest.raises(RunError, match="Who and why stands in"):
        run_rounds(first, server, progress)
    second = HandMadeGrid(4, lambda c, r: _ones(r, template))
    server = replace(server, randomness=lambda server_round: SeededRandomness(9))
    run_rounds(second, server, progress)
    failed = {client for client, asked in first.requests if asked.server_round}
    again = {client for client, request in second.requests if request.server_round == 1}
    assert failed == again != set()


def test_a_damaged_checkpoint_is_not_gone_behind(secret) -> None:
    server, progress = secret
    template = dict(progress.trainable)
    run_rounds(HandMadeGrid(4, lambda c, r: _ones(r, template)), server, progress)
    folder = server.output / "checkpoint"
    newest = max(folder.iterdir())
    newest.write_bytes(newest.read_bytes()[:-9])
    key = server.config.hash
    assert load_checkpoint(folder, key).server_round == 11
    with pytest.raises(RunError, match="a second time"):
        load_checkpoint(folder, key, may_fall_back=False)


def test_a_poisson_cohort_takes_each_client_by_itself() -> None:
    config = _client_level("cohort.sampling=poisson", "cohort.size=1")
    source = SeededRandomness(0)
    cohorts = [drawn(config, source) for _ in range(4000)]
    together = sum(0 in cohort and 1 in cohort for cohort in cohorts)
    # Each of four with probability 1/4, two at once 1/16, none at all (3/4)^4.
    assert sum(0 in cohort for cohort in cohorts) == pytest.approx(1000, abs=110)
    assert together == pytest.approx(250, abs=60)
    assert sum(not cohort for cohort in cohorts) == pytest.approx(1266, abs=120)


def test_a_fixed_cohort_has_its_size_and_every_client_alike() -> None:
    config = _client_level("cohort.sampling=fixed")
    source = SeededRandomness(0)
    cohorts = [drawn(config, source) for _ in range(4000)]
    assert {len(set(cohort)) for cohort in cohorts} == {2}
    for client in range(4):
        taken = sum(client in cohort for cohort in cohorts)
        assert taken == pytest.approx(2000, abs=130)


def test_a_payload_that_is_not_finite_is_refused(secret) -> None:
    server, progress = secret
    before = flatten(progress.trainable)
    template = dict(progress.trainable)

    def reply(client: int, request: TrainRequest) -> TrainReply:
        answer = _ones(request, template)
        payload = Payload.from_bytes(answer.payload)
        body = b"\x00\x00\xc0\x7f" * (len(payload.body) // 4)  # NaN in fp32
        return replace(answer, payload=replace(payload, body=body).to_bytes())

    server = replace(server, config=_client_level("cohort.min_reply_share=0.1"))
    with pytest.raises(RunError, match="too small a share"):
        run_rounds(HandMadeGrid(4, reply), server, progress)
    assert "invalid-payload" in server.secrets.path.read_text()
    assert torch.equal(flatten(progress.trainable), before)


def test_every_client_joins_before_the_first_round_or_nothing_starts(secret) -> None:
    server, progress = secret
    template = dict(progress.trainable)

    def reply(client: int, request: TrainRequest) -> TrainReply:
        if client == 3:
            return TrainReply("budget-spent")
        return _ones(request, template)

    with pytest.raises(RunError, match=r"all 4 clients to join, got 3 \(1 budget"):
        run_rounds(HandMadeGrid(4, reply), server, progress)
    grid = HandMadeGrid(4, lambda c, r: _ones(r, template))
    run_rounds(grid, server, progress)
    joined = [client for client, request in grid.requests if not request.server_round]
    assert sorted(joined) == [0, 1, 2, 3]
