"""Whose model is judged where clients keep a part to themselves."""

from dataclasses import replace

import pytest
import torch

from fedpeft.evaluation import evaluate
from fedpeft.model import load_trainable_state
from fedpeft.privacy import make_plan
from fedpeft.tensors import Tensors
from server.checkpoint import Progress
from server.judging import judge
from server.runtime import Runtime
from server.setup import Server
from tests.server.conftest import small_run

BIAS = "head.bias"


def _always(label: int) -> Tensors:
    """A head that gives everybody the same answer."""
    return {BIAS: 100.0 * torch.nn.functional.one_hot(torch.tensor(label), 3).float()}


@pytest.fixture
def personal(server: Server, start: Progress) -> Server:
    local = {BIAS: start.trainable.pop(BIAS)}
    return replace(server, model=replace(server.model, local_start=local))


def test_a_metric_is_the_mean_over_all_clients_and_the_worst_is_named(
    personal: Server, start: Progress
) -> None:
    parts: list[Tensors] = [_always(0), _always(1), {}, {}]
    runtime = Runtime(local_parts=lambda: parts)
    shares = [float((personal.held_out.labels == i).float().mean()) for i in (0, 1)]
    load_trainable_state(personal.model, start.trainable)
    absent = evaluate(personal.model, personal.held_out, "fp32")["accuracy"]
    found = judge(replace(personal, runtime=runtime), start.trainable)
    assert found["accuracy"] == pytest.approx((sum(shares) + 2 * absent) / 4)
    assert found["accuracy_worst"] == min(*shares, absent)


def test_where_local_parts_are_not_at_hand_nothing_is_judged(
    personal: Server, start: Progress
) -> None:
    assert judge(personal, start.trainable) == {}


def test_at_client_level_local_parts_are_not_read(
    personal: Server, start: Progress
) -> None:
    def read() -> list[Tensors]:
        raise AssertionError

    config = small_run("privacy.unit=client")
    hidden = replace(personal, config=config, plan=make_plan(config))
    assert judge(replace(hidden, runtime=Runtime(local_parts=read)), {}) == {}
