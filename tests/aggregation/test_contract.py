"""The contract of every aggregator and server optimiser, over the menus."""

import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.aggregation import (
    AGGREGATORS,
    SERVER_OPTIMIZERS,
    Mean,
    Optimized,
    ServerAdam,
    ServerOptimizer,
    ServerSGD,
    build_aggregator,
)
from fedpeft.errors import ConfigError
from fedpeft.interfaces import Aggregator, Update
from fedpeft.sections import AggregationSection, Component
from fedpeft.seeds import generator
from fedpeft.tensors import Tensors, norm, subtract, zeros_like

RULES: list[tuple[str, dict[str, object]]] = [
    ("mean", {}),
    ("mean", {"weighting": "examples"}),
    ("pool_weighted", {}),
]

OPTIMIZERS: list[tuple[str, dict[str, object]]] = [
    ("sgd", {"learning_rate": 0.5}),
    ("momentum", {}),
    ("adam", {"learning_rate": 0.1}),
    ("rank_allocation", {"target_rank": 1, "warmup_rounds": 3, "final_round": 9}),
]

RULE = [AGGREGATORS[name](**options) for name, options in RULES]
OPTIMIZER = [SERVER_OPTIMIZERS[name](**options) for name, options in OPTIMIZERS]
WRAPPED = [Optimized(Mean(), optimizer) for optimizer in OPTIMIZER]

every_rule = pytest.mark.parametrize("rule", RULE, ids=str)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZER, ids=str)
every_aggregator = pytest.mark.parametrize("aggregator", [*RULE, *WRAPPED], ids=str)


def random_tensors(seed: int) -> Tensors:
    rng = generator(seed, "update")
    return {
        "layer.0.lora_B": torch.randn(4, 2, generator=rng),
        "layer.0.lora_A": torch.randn(2, 3, generator=rng),
        "layer.0.lora_E": torch.randn(2, 1, generator=rng),
        "head.bias": torch.randn(3, generator=rng),
        "scalar": torch.randn((), generator=rng),
        "nothing": torch.zeros(0),
    }


def random_updates(count: int) -> list[Update]:
    return [Update(random_tensors(i), num_examples=1 + i % 4) for i in range(count)]


def one_round(aggregator: Aggregator, updates: list[Update]) -> Tensors:
    step, _ = aggregator.aggregate(updates, aggregator.init(random_tensors(0)))
    return step


def assert_equal(left: Tensors, right: Tensors) -> None:
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_every_variant_of_the_menus_has_settings() -> None:
    assert {name for name, _ in RULES} == set(AGGREGATORS)
    assert {name for name, _ in OPTIMIZERS} == set(SERVER_OPTIMIZERS)


# Rules.


@every_rule
def test_one_client_returns_its_update(rule: Aggregator) -> None:
    update = Update(random_tensors(1), num_examples=7)
    assert_equal(one_round(rule, [update]), update.tensors)


@every_rule
@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_equal_updates_return_the_same(rule: Aggregator, count: int) -> None:
    updates = [Update(random_tensors(1), num_examples=n + 1) for n in range(count)]
    assert_equal(one_round(rule, updates), random_tensors(1))


# Every aggregator, wrapped or not.


@every_aggregator
@given(count=st.integers(1, 12), order=st.randoms(use_true_random=False))
def test_order_does_not_matter(
    aggregator: Aggregator, count: int, order: random.Random
) -> None:
    updates = random_updates(count)
    turned = order.sample(updates, count)
    step, other = one_round(aggregator, updates), one_round(aggregator, turned)
    for name, tensor in step.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-7)


@every_aggregator
def test_shapes_and_dtypes_come_back(aggregator: Aggregator) -> None:
    step = one_round(aggregator, random_updates(3))
    for name, tensor in random_tensors(0).items():
        assert step[name].shape == tensor.shape
        assert step[name].dtype == tensor.dtype


@every_aggregator
def test_the_stream_is_consumed_once_and_one_update_lives_at_a_time(
    aggregator: Aggregator,
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def fresh(seed: int) -> Update:
        tensors = random_tensors(seed)
        alive.append(weakref.ref(tensors["layer.0.lora_B"]))
        return Update(tensors, num_examples=1)

    def stream() -> Iterator[Update]:
        for seed in range(5):
            assert [ref() for ref in alive] == [None] * seed
            yield fresh(seed)

    updates = stream()
    aggregator.aggregate(updates, aggregator.init(random_tensors(0)))
    assert next(updates, None) is None
    assert len(alive) == 5


@every_aggregator
def test_inputs_are_left_alone(aggregator: Aggregator) -> None:
    updates = random_updates(3)
    state = aggregator.init(random_tensors(0))
    kept = {name: tensor.clone() for name, tensor in state.items()}
    aggregator.aggregate(updates, state)
    assert_equal(state, kept)
    for update, before in zip(updates, random_updates(3), strict=True):
        assert_equal(update.tensors, before.tensors)


@every_aggregator
def test_an_empty_stream_is_refused(aggregator: Aggregator) -> None:
    with pytest.raises(ValueError, match="at least one update"):
        one_round(aggregator, [])


@every_aggregator
@pytest.mark.parametrize(
    "change", [{"head.bias": torch.zeros(1)}, {"one.more": torch.zeros(1)}], ids=str
)
def test_an_update_of_another_shape_is_refused(
    aggregator: Aggregator, change: Tensors
) -> None:
    # torch would broadcast a shape of one silently.
    other = Update(random_tensors(1) | change, num_examples=1)
    with pytest.raises(ValueError, match="same names and shapes"):
        one_round(aggregator, [*random_updates(1), other])


@every_aggregator
def test_state_keeps_its_names_and_resumes_bit_for_bit(aggregator: Aggregator) -> None:
    state = aggregator.init(random_tensors(0))
    names = list(state)
    for server_round in range(3):
        # A checkpoint returns copies, in the order of its own choice.
        stored = {name: state[name].clone() for name in reversed(names)}
        updates = [Update(random_tensors(server_round), num_examples=1)]
        step, state = aggregator.aggregate(updates, state)
        resumed, next_state = aggregator.aggregate(updates, stored)
        assert set(state) == set(names)
        assert_equal(step, resumed)
        assert all(torch.equal(state[name], next_state[name]) for name in names)


# Optimisers.


@every_optimizer
def test_nothing_moves_without_updates(optimizer: ServerOptimizer) -> None:
    like = random_tensors(0)
    state = optimizer.init(like)
    for _ in range(3):
        step, state = optimizer.apply(zeros_like(like), state)
        assert norm(step) == 0


@every_optimizer
def test_the_first_step_goes_where_the_aggregate_points(
    optimizer: ServerOptimizer,
) -> None:
    aggregate = random_tensors(0)
    step, _ = optimizer.apply(aggregate, optimizer.init(aggregate))
    assert all(torch.equal(step[n].sign(), aggregate[n].sign()) for n in aggregate)


def test_sgd_with_learning_rate_one_changes_nothing() -> None:
    wrapped = Optimized(Mean(), ServerSGD())
    updates = random_updates(5)
    assert_equal(one_round(wrapped, updates), one_round(Mean(), updates))


def test_wrapping_twice_applies_both() -> None:
    inner = Optimized(Mean(), ServerSGD(learning_rate=0.5))
    twice = Optimized(inner, ServerSGD(learning_rate=4.0))
    tensors = random_tensors(0)
    step = one_round(twice, [Update(tensors)])
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    assert norm(subtract(step, doubled)) == 0


# From the configuration.


def test_config_builds_the_rule_alone() -> None:
    section = AggregationSection(name="mean", weighting="examples")
    assert build_aggregator(section) == Mean(weighting="examples")


def test_config_builds_the_rule_with_its_optimizer() -> None:
    optimizer = Component(name="adam", learning_rate=0.1, beta1=0.5)
    section = AggregationSection(name="mean", server_optimizer=optimizer)
    adam = ServerAdam(learning_rate=0.1, beta1=0.5)
    assert build_aggregator(section) == Optimized(Mean(), adam)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "median"}, r"\[aggregation\] name: expected one of mean"),
        ({"name": "mean", "weigting": "uniform"}, "did you mean 'weighting'"),
        ({"name": "mean", "weighting": "size"}, "weighting"),
        (
            {"name": "mean", "server_optimizer": {"name": "adan"}},
            r"\[aggregation.server_optimizer\] name.*did you mean 'adam'",
        ),
        (
            {"name": "mean", "server_optimizer": {"name": "adam"}},
            "learning_rate: expected a value, got none",
        ),
        (
            {"name": "mean", "server_optimizer": {"name": "momentum", "momentum": 1}},
            "expected 0 <= momentum < 1, got 1.0",
        ),
    ],
)
def test_a_bad_section_is_one_line(table: dict[str, object], message: str) -> None:
    section = AggregationSection.model_validate(table)
    with pytest.raises(ConfigError, match=message):
        build_aggregator(section)
