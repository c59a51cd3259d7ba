"""The detector says nothing of honest states, and something of each kind of other."""

import dataclasses

import pytest
import torch

from fedpeft.attacks.detector import inspect, reach
from fedpeft.model import load_trainable_state, shared_state
from tests.attacks.federation import play, sentences, small_config, small_model

METHODS = (
    "bias",
    "bottleneck",
    "film",
    "head",
    "ia3",
    "lora",
    "nola",
    "prefix",
    "prompt",
    "ssf",
    "ssf_pool",
    "vera",
)
ADAMW = small_config("training.optimizer=adamw", "training.learning_rate=0.01")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_honest_states_of_every_round_raise_no_alarm(
    method: str, optimizer: str
) -> None:
    knowledge = small_model(method)
    if optimizer == "adamw":
        knowledge = dataclasses.replace(knowledge, config=ADAMW)
    start = shared_state(knowledge.model)
    parts = [sentences(2, seed=300 + client) for client in range(2)]
    seen, final = play(knowledge, start, parts, rounds=3)
    states = [*(part.state for part in seen[0]), final]
    for server_round, state in enumerate(states, 1):
        assert inspect(state, start, knowledge.config, server_round) == []
    load_trainable_state(knowledge.model, start)


def _start() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "down.weight": torch.randn(12, 32, generator=rng),
        "down.bias": torch.randn(12, generator=rng),
    }


def _kinds(**changed: torch.Tensor) -> set[str]:
    """Names what is found where the adapter's `weight` or `bias` is another."""
    start = _start()
    state = {**start, **{f"down.{name}": value for name, value in changed.items()}}
    return {f.kind for f in inspect(state, start, ADAMW, 2)}


def test_each_kind_of_finding() -> None:
    start = _start()
    assert _kinds() == set()
    assert _kinds(bias=torch.full((12,), torch.nan)) == {"not-finite"}
    assert _kinds(weight=start["down.weight"] + 100) >= {"too-far"}
    assert _kinds(weight=start["down.weight"][:1].repeat(12, 1)) >= {"same-rows"}
    assert _kinds(bias=start["down.bias"].sort().values) >= {"ladder"}


def test_scaled_and_mirrored_rows_are_the_same_direction() -> None:
    scales = torch.tensor([1.0, -2.0, 3.0, -0.5]).repeat(3)[:, None]
    assert "same-rows" in _kinds(weight=scales * _start()["down.weight"][:1])


def test_rows_that_start_at_zero_may_get_one_direction_in_honest_training() -> None:
    start = {"down.weight": torch.zeros(8, 384), "down.bias": torch.zeros(8)}
    row = torch.randn(384, generator=torch.Generator().manual_seed(1))
    moved = {**start, "down.weight": 0.001 * torch.arange(1.0, 9)[:, None] * row}
    assert inspect(moved, start, small_config(), 2) == []
    start["down.weight"] = torch.eye(8, 384)
    assert [f.kind for f in inspect(moved, start, small_config(), 2)] == ["same-rows"]


def test_virtual_tokens_have_no_thresholds_and_may_all_come_to_one_direction() -> None:
    start = {"layer.5.prompt.tokens": 0.02 * torch.eye(8, 384)}
    moved = {"layer.5.prompt.tokens": start["layer.5.prompt.tokens"] + 1.0}
    assert inspect(moved, start, small_config(), 2) == []


def test_the_first_round_starts_where_everybody_does() -> None:
    start = _start()
    moved = {**start, "down.bias": start["down.bias"] + 1e-6}
    assert [f.kind for f in inspect(moved, start, ADAMW, 1)] == ["not-the-start"]
    assert inspect(moved, start, ADAMW, 2) == []


def test_adamw_moves_a_value_by_its_rate_and_sgd_without_clipping_by_anything() -> None:
    # 1 step a round, 0.01 a step, sqrt(10) of it, and ten times that: 0.316 a round.
    assert reach(ADAMW, 2) == pytest.approx(0.1 * 10**0.5)
    assert reach(ADAMW, 3) == pytest.approx(0.2 * 10**0.5)
    assert reach(small_config(), 3) is None


def test_clipped_steps_and_a_momentum_of_the_server_are_counted() -> None:
    # 0.3 a step on gradients of norm 1: 3 with the room; with half a deviation 4.5.
    private = ("privacy.unit=example", "privacy.clipping_norm=1.0")
    assert reach(small_config(*private), 2) == pytest.approx(3.0)
    assert reach(small_config(*private), 2, 0.5) == pytest.approx(4.5)
    momentum = 'aggregation={name="mean",server_optimizer={name="momentum"}}'
    assert reach(small_config(*private, momentum), 2) == pytest.approx(30.0)
    adam = 'server_optimizer={name="adam",learning_rate=0.1}'
    unknown = small_config(*private, f'aggregation={{name="mean",{adam}}}')
    assert reach(unknown, 2) is None


def test_another_method_s_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected 2 tensors"):
        inspect({}, _start(), ADAMW, 1)
