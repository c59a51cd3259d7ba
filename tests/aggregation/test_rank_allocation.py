"""Rank allocation, by numbers worked out by hand."""

import pytest
import torch
from safetensors.torch import save_file

from fedpeft.aggregation import Mean, Optimized, RankAllocation, build_aggregator
from fedpeft.errors import ConfigError
from fedpeft.interfaces import State, Update
from fedpeft.peft import AdaLora
from fedpeft.privacy import DpSgd
from fedpeft.sections import AggregationSection
from fedpeft.tensors import Tensors, add
from tests.helpers import toy, toy_losses

Row = tuple[float, ...]


def layer(a: Row, e: Row, b: Row, name: str = "query") -> Tensors:
    """One input and one output: a triplet is three numbers."""
    return {
        f"{name}.lora_A.default": torch.tensor(a).view(-1, 1),
        f"{name}.lora_E.default": torch.tensor(e).view(-1, 1),
        f"{name}.lora_B.default": torch.tensor(b).view(1, -1),
    }


def e_of(tensors: Tensors, name: str = "query") -> list[float]:
    values: list[float] = tensors[f"{name}.lora_E.default"].flatten().tolist()
    return values


def ranks(state: Tensors) -> int:
    return sum(int(t.count_nonzero()) for n, t in state.items() if "lora_E" in n)


def once(rule: RankAllocation, start: Tensors, aggregate: Tensors) -> Tensors:
    step, _ = rule.apply(aggregate, rule.init(start))
    return add(start, step)


def test_importance_by_hand() -> None:
    # Smoothing 0.5: sensitivity is half of |value * step|, and so is uncertainty.
    # Triplet 0: E 2 * 1, A and B 0: 1 * 1. Triplet 1: A 4 * 1: 2 * 2. Triplet 2: B 1.
    rule = RankAllocation(target_rank=1, final_round=1, smoothing=0.5)
    start = layer(a=(0, 4, 0), e=(2, 0.5, 3), b=(0, 0, 1))
    step = layer(a=(1, 1, 1), e=(1, 0, 0), b=(1, 1, 1))
    after = once(rule, start, step)
    assert e_of(after) == [0, 0.5, 0]
    assert after["query.lora_A.default"].flatten().tolist() == [1, 5, 1]


def test_a_row_counts_by_its_mean() -> None:
    # Two inputs: row 0 has 4 * 4 and 0, mean 8; row 1 has 3 * 3 twice, mean 9.
    rule = RankAllocation(target_rank=1, final_round=1, smoothing=0.5)
    start = layer(a=(0, 0), e=(1, 1), b=(0, 0))
    start["query.lora_A.default"] = torch.tensor([[8.0, 0.0], [6.0, 6.0]])
    step = {name: torch.ones_like(tensor) for name, tensor in start.items()}
    assert e_of(once(rule, start, step)) == [0, 2]


def test_layers_compete_for_one_budget() -> None:
    rule = RankAllocation(target_rank=1, final_round=1)
    rich, poor = layer((0, 0), (3, 4), (0, 0)), layer((0, 0), (1, 2), (0, 0), "value")
    step = {name: torch.ones_like(t) for name, t in (rich | poor).items()}
    after = once(rule, rich | poor, step)
    assert e_of(after) == [4, 5]
    assert e_of(after, "value") == [0, 0]


def test_the_budget_falls_by_a_cubic() -> None:
    # 8 triplets to 0 + 1 * 1: from round 3 on 1 + 7 * (left / 4)^3.
    rule = RankAllocation(target_rank=1, warmup_rounds=2, final_round=6)
    start = layer((1,) * 8, tuple(range(1, 9)), (1,) * 8)
    step = {name: torch.full_like(tensor, 0.1) for name, tensor in start.items()}
    state, alive, rule_state = start, [], rule.init(start)
    for _ in range(7):
        taken, rule_state = rule.apply(step, rule_state)
        state = add(state, taken)
        alive.append(ranks(state))
    assert alive == [8, 8, 3, 1, 1, 1, 1]  # 1 + 2.95, 1 + 0.875, 1 + 0.11


def test_its_state_can_be_saved_at_once(tmp_path) -> None:
    start = layer((1, 1), (1, 1), (1, 1))
    state = RankAllocation(target_rank=1, final_round=1).init(start)
    save_file(state, tmp_path / "state.safetensors")  # refuses what shares memory
    assert not {t.data_ptr() for t in start.values()} & {
        t.data_ptr() for t in state.values()
    }


def test_what_it_follows_is_what_the_server_has() -> None:
    rule = RankAllocation(target_rank=1, warmup_rounds=1, final_round=4)
    state = layer((0.3, 0.1, 0.7), (0.2, 0.9, 0.1), (0.5, 0.6, 0.4))
    rule_state: State = rule.init(state)
    rng = torch.Generator().manual_seed(0)
    for _ in range(6):
        step = {n: torch.randn(t.shape, generator=rng) for n, t in state.items()}
        taken, rule_state = rule.apply(step, rule_state)
        state = add(state, taken)
        for name, tensor in state.items():
            assert torch.equal(rule_state[f"value.{name}"], tensor)
    assert ranks(state) == 1


def test_a_triplet_that_was_cut_may_come_back() -> None:
    rule = RankAllocation(target_rank=1, final_round=1, smoothing=0.5)
    state = layer(a=(1, 1), e=(2, 1), b=(1, 1))
    step, rule_state = rule.apply(layer((0, 0), (1, 1), (0, 0)), rule.init(state))
    state = add(state, step)
    assert e_of(state) == [3, 0]
    step, _ = rule.apply(layer((0, 9), (0, 5), (0, 0)), rule_state)
    assert e_of(add(state, step)) == [0, 5]


def test_clients_train_a_dead_triplet_back_to_life() -> None:
    case = toy(AdaLora(initial_rank=3, target_rank=1), noise=0.1)
    values = [p for n, p in case.model.named_parameters() if "lora_E" in n]
    for value in values:
        value.data.zero_()
    engine = DpSgd(clipping_norm=1.0, noise_multiplier=0.0, nominal_batch=4)
    engine.bind(case.model, case.operations)
    engine.accumulate(toy_losses(case.model, 4))
    engine.step(lambda total, _: total)
    assert all((value.grad != 0).all() for value in values)


def test_other_tensors_pass() -> None:
    rule = RankAllocation(target_rank=1, final_round=1)
    start = layer((1, 1), (1, 1), (1, 1)) | {"head.weight": torch.ones(2)}
    step = {name: torch.full_like(tensor, 0.5) for name, tensor in start.items()}
    assert once(rule, start, step)["head.weight"].tolist() == [1.5, 1.5]


def test_a_rank_that_is_low_already_cuts_nothing() -> None:
    rule = RankAllocation(target_rank=5, final_round=1)
    start = layer((1, 1), (1, 1), (1, 1))
    assert ranks(once(rule, start, start)) == 2


def test_the_configuration_names_it() -> None:
    table = {"name": "rank_allocation", "target_rank": 2, "final_round": 9}
    section = AggregationSection.model_validate(
        {"name": "mean", "server_optimizer": table}
    )
    aggregator = build_aggregator(section)
    assert aggregator == Optimized(Mean(), RankAllocation(2, 9))
    start = layer((1,), (1,), (1,))
    step, _ = aggregator.aggregate([Update(start)], aggregator.init(start))
    assert e_of(step) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 0}, "Expected target_rank >= 1, got 0."),
        ({"warmup_rounds": 5}, "warmup_rounds < final_round, got 5 and 5."),
        ({"smoothing": 1.0}, "Expected 0 <= smoothing < 1, got 1.0."),
    ],
)
def test_bad_hyperparameters_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankAllocation(**{"target_rank": 1, "final_round": 5} | options)


def test_a_method_without_triplets_is_refused() -> None:
    rule = RankAllocation(target_rank=1, final_round=1)
    with pytest.raises(ConfigError, match=r"expected .* triplets .* 'adalora'"):
        rule.init({"query.lora_A.weight": torch.ones(1)})
