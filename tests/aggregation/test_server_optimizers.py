"""Server optimisers, by numbers worked out by hand."""

import math

import pytest
import torch

from fedpeft.aggregation import (
    ServerAdam,
    ServerMomentum,
    ServerOptimizer,
    ServerSGD,
)


def steps(optimizer: ServerOptimizer, *aggregates: float) -> list[float]:
    state = optimizer.init({"a": torch.zeros(1)})
    taken = []
    for value in aggregates:
        step, state = optimizer.apply({"a": torch.tensor([value])}, state)
        taken.append(step["a"].item())
    return taken


def test_sgd_scales() -> None:
    assert steps(ServerSGD(learning_rate=0.5), 2.0, -3.0) == [1.0, -1.5]


def test_momentum_sums_the_past() -> None:
    # Velocities 4, 2 + 4, 3 - 8, -2.5 + 0.
    optimizer = ServerMomentum(learning_rate=2.0, momentum=0.5)
    assert steps(optimizer, 4.0, 4.0, -8.0, 0.0) == [8.0, 12.0, -10.0, -5.0]


def test_momentum_zero_is_sgd() -> None:
    values = (1.0, -2.0, 0.5)
    plain = ServerSGD(learning_rate=0.3)
    assert steps(ServerMomentum(0.3, momentum=0.0), *values) == steps(plain, *values)


def test_momentum_takes_a_constant_ten_times_in_the_limit() -> None:
    assert steps(ServerMomentum(), *[1.0] * 200)[-1] == pytest.approx(10)


def test_adam_by_hand() -> None:
    # tau = 1, so v starts at 1. Round 1, aggregate 2: m = 0.5 * 2 = 1,
    # v = 0.75 * 1 + 0.25 * 4 = 1.75. Round 2, aggregate -1: m = 0.5 - 0.5 = 0.
    # Round 3, aggregate 4: m = 2, v = 0.75 * (0.75 * 1.75 + 0.25) + 0.25 * 16.
    optimizer = ServerAdam(learning_rate=0.1, beta1=0.5, beta2=0.75, tau=1.0)
    third = 0.75 * 1.5625 + 4.0
    expected = [0.1 / (math.sqrt(1.75) + 1), 0.0, 0.2 / (math.sqrt(third) + 1)]
    assert steps(optimizer, 2.0, -1.0, 4.0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.5, -20.0])
def test_adam_moves_a_large_value_by_the_learning_rate_at_once(value: float) -> None:
    (first,) = steps(ServerAdam(learning_rate=0.1), value)
    assert first == pytest.approx(math.copysign(0.1, value), rel=0.05)


def test_adam_overshoots_a_constant_by_at_most_two_point_two() -> None:
    taken = steps(ServerAdam(learning_rate=1.0), *[5.0] * 1000)
    assert 2.0 < max(taken) < 2.2
    assert 10 <= taken.index(max(taken)) <= 16
    assert taken[-1] == pytest.approx(1, abs=1e-3)


def test_adam_hardly_amplifies_what_is_far_below_tau() -> None:
    (first,) = steps(ServerAdam(learning_rate=0.1, tau=1.0), 1e-6)
    # m = 1e-7 over sqrt(0.99) + 1.
    assert first == pytest.approx(0.1 * 1e-7 / (math.sqrt(0.99) + 1), rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (ServerSGD, {"learning_rate": 0.0}, "Expected a finite learning_rate > 0"),
        (ServerMomentum, {"learning_rate": math.inf}, "finite learning_rate > 0"),
        (ServerMomentum, {"momentum": -0.1}, "Expected 0 <= momentum < 1, got -0.1."),
        (ServerAdam, {"learning_rate": math.nan}, "finite learning_rate > 0, got nan"),
        (ServerAdam, {"learning_rate": 1.0, "beta1": 1.0}, "0 <= beta1 < 1"),
        (ServerAdam, {"learning_rate": 1.0, "beta2": 2.0}, "0 <= beta2 < 1"),
        (ServerAdam, {"learning_rate": 1.0, "tau": 0.0}, "Expected a finite tau > 0"),
    ],
)
def test_bad_hyperparameters_are_refused(
    optimizer: type[ServerOptimizer], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(**options)
