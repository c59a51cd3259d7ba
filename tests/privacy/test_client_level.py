"""Client-level privacy at the server: clipping, noise, its norm and its state."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy import stats

from fedpeft.aggregation import Mean, Optimized, ServerMomentum
from fedpeft.interfaces import Update
from fedpeft.privacy.banded import Banded
from fedpeft.privacy.client_level import (
    NORM_RANGE,
    AdaptiveNorm,
    PrivateMean,
    split_noise,
)
from fedpeft.privacy.randomness import SecureRandomness, SeededRandomness, grid
from fedpeft.tensors import flatten, norm, subtract

# A right generator fails a test of this level once in a million runs.
LEVEL = 1e-6
LIKE = {"a": torch.zeros(2), "b": torch.zeros(1, 1)}


def seeded(server_round):
    return SeededRandomness(server_round)


def rule(clipping_norm=1.0, noise_multiplier=0.0, nominal_cohort=1.0, **options):
    return PrivateMean(
        clipping_norm, noise_multiplier, nominal_cohort, seeded, **options
    )


def update(*values, num_examples=None):
    first, second, third = values
    tensors = {"a": torch.tensor([first, second]), "b": torch.tensor([[third]])}
    return Update(tensors, num_examples)


def one_round(aggregator, updates, like=LIKE):
    return aggregator.aggregate(iter(updates), aggregator.init(like))


def rounds(aggregator, count, updates=(), like=LIKE):
    """The flattened steps of several rounds, and the last state."""
    state, steps = aggregator.init(like), []
    for _ in range(count):
        step, state = aggregator.aggregate(iter(updates), state)
        steps.append(flatten(step))
    return steps, state


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# The sum.


def test_three_updates_by_hand():
    # Norms 9, 3 and 18 over both tensors; the first and the last are cut to 6.
    updates = [
        update(1.0, 4.0, 8.0),
        update(2.0, 2.0, 1.0),
        update(-12.0, 12.0, 6.0),
    ]
    step, _ = one_round(rule(clipping_norm=6.0, nominal_cohort=3.0), updates)
    expected = {
        "a": torch.tensor([(2 / 3 + 2 - 4) / 3, (8 / 3 + 2 + 4) / 3]),
        "b": torch.tensor([[(16 / 3 + 1 + 2) / 3]]),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(step[name], tensor, rtol=1e-5, atol=0)


def test_without_clipping_and_noise_it_is_the_mean():
    updates = [update(float(n), 1.0 / n, -3.0) for n in range(1, 5)]
    step, _ = one_round(rule(math.inf, nominal_cohort=4.0), updates)
    mean, _ = Mean().aggregate(updates, {})
    torch.testing.assert_close(step, mean)


def test_the_divisor_stays_when_fewer_answer():
    step, _ = one_round(rule(nominal_cohort=4.0), [update(0.5, 0.0, 0.0)])
    assert step["a"].tolist() == [0.125, 0.0]


def test_private_counts_are_ignored():
    def released(few, many):
        updates = [update(0.1, 0.2, 0.3, num_examples=few)]
        updates.append(update(3.0, 2.0, 1.0, num_examples=many))
        return one_round(rule(noise_multiplier=1.0), updates)[0]

    assert_equal(released(1, 1000), released(None, -5))


EXTREME = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 1e30])


@given(
    st.lists(st.tuples(*[st.floats(-10, 10, width=32)] * 3), max_size=4),
    st.tuples(EXTREME, EXTREME, EXTREME),
    st.integers(0, 4),
    st.floats(1e-3, 1e3),
)
def test_one_client_more_moves_the_sum_by_at_most_the_norm(others, one, place, bound):
    before = [update(*values) for values in others]
    after = [*before[:place], update(*one), *before[place:]]
    without, _ = one_round(rule(bound), before)
    with_it, _ = one_round(rule(bound), after)
    assert norm(subtract(with_it, without)) <= bound


@given(
    st.lists(st.tuples(*[st.floats(-9, 9, width=32)] * 3), max_size=3),
    st.sampled_from([math.nan, math.inf, -math.inf, 3e200]),
)
def test_an_update_that_is_not_finite_counts_as_none_alone(others, bad):
    good = [update(*values) for values in others]
    broken = update(0.0, 0.0, 0.0)
    # Squared, 3e200 is beyond double precision.
    broken.tensors["b"] = torch.full((1, 1), bad, dtype=torch.float64)
    aggregator = rule(noise_multiplier=1.0, adaptive=AdaptiveNorm(0.5, 0.2, 1.0))
    left, left_state = one_round(aggregator, [broken, *good])
    right, right_state = one_round(aggregator, good)
    assert_equal(left, right)
    assert_equal(left_state, right_state)


def test_a_huge_update_is_cut_and_not_lost():
    step, _ = one_round(rule(), [update(1e30, 0.0, 0.0)])
    assert step["a"].tolist() == pytest.approx([1.0, 0.0], rel=1e-5)


def test_an_update_of_zeros_is_no_division_by_zero():
    step, _ = one_round(rule(), [update(0.0, 0.0, 0.0)])
    assert norm(step) == 0


def test_names_may_come_in_any_order():
    turned = Update(dict(reversed(update(0.1, 0.2, 0.3).tensors.items())))
    left, _ = one_round(rule(noise_multiplier=1.0), [update(0.1, 0.2, 0.3)])
    right, _ = one_round(rule(noise_multiplier=1.0), [turned])
    assert_equal(left, right)


@pytest.mark.parametrize(
    "change", [{"b": torch.zeros(1)}, {"c": torch.zeros(1)}], ids=str
)
def test_an_update_of_another_shape_is_refused(change):
    other = Update(update(0.0, 0.0, 0.0).tensors | change)
    with pytest.raises(ValueError, match="same names and shapes"):
        one_round(rule(), [other])


def test_shapes_and_types_come_back():
    like = {
        "scalar": torch.zeros(()),
        "nothing": torch.zeros(0, 3),
        "double": torch.zeros(2, 2, dtype=torch.float64),
        "half": torch.zeros(3, dtype=torch.bfloat16),
    }
    for updates in ([], [Update(like)]):
        step, _ = one_round(rule(noise_multiplier=1.0), updates, like)
        for name, tensor in like.items():
            assert step[name].shape == tensor.shape
            assert step[name].dtype == tensor.dtype


def test_the_stream_is_consumed_once_and_one_update_lives_at_a_time():
    alive = []

    def stream():
        for _ in range(5):
            assert [ref() for ref in alive] == [None] * len(alive)
            tensors = update(1.0, 2.0, 3.0).tensors
            alive.append(weakref.ref(tensors["a"]))
            answer = Update(tensors)
            del tensors
            yield answer
            del answer

    updates = stream()
    rule().aggregate(updates, rule().init(LIKE))
    assert next(updates, None) is None
    assert len(alive) == 5


# The noise.


def noise_of(aggregator, updates, size):
    like = {"w": torch.zeros(size)}
    step, _ = one_round(aggregator, updates, like)
    return step["w"].double() * aggregator.nominal_cohort


@pytest.mark.parametrize(
    ("factor", "accepted"), [(1, True), (2 / 3, False), (1.5, False)]
)
@pytest.mark.parametrize("clients", [0, 7])
def test_the_standard_deviation_is_right_and_no_other(factor, accepted, clients):
    # 0.5 * 3 on the sum: not 3, and no share of it a client.
    aggregator = PrivateMean(0.5, 3.0, 10.0, lambda server_round: SecureRandomness())
    updates = [Update({"w": torch.ones(20_000)})] * clients
    total = clients * 0.5 / math.sqrt(20_000)
    noise = noise_of(aggregator, updates, 20_000) - total
    test = stats.kstest(noise.numpy(), stats.norm(0, 1.5 * factor).cdf)
    assert (test.pvalue > LEVEL) == accepted


def test_what_is_released_lies_on_the_public_grid():
    released = noise_of(rule(noise_multiplier=3.0), [], 1000)
    assert torch.equal(released % grid(3.0), torch.zeros(1000).double())


def test_rounds_get_different_noise():
    steps, _ = rounds(rule(noise_multiplier=1.0), 3)
    assert len(torch.cat(steps).unique()) == 9


def test_the_same_seed_and_round_give_the_same_bytes():
    left, _ = rounds(rule(noise_multiplier=1.0), 3, [update(1.0, 2.0, 3.0)])
    right, _ = rounds(rule(noise_multiplier=1.0), 3, [update(1.0, 2.0, 3.0)])
    assert all(map(torch.equal, left, right))


def test_every_round_asks_for_its_own_source_once():
    asked = []

    def source(server_round):
        asked.append(server_round)
        return SeededRandomness(0)

    adaptive = AdaptiveNorm(0.5, 0.2, 1.0)
    rounds(PrivateMean(1.0, 1.0, 1.0, source, adaptive, Banded(3, 2)), 3)
    assert asked == [1, 2, 3]


def test_a_server_optimizer_may_wrap_it():
    aggregator = Optimized(rule(), ServerMomentum(momentum=0.5))
    steps, _ = rounds(aggregator, 2, [update(0.5, 0.0, 0.0)])
    assert [step.tolist() for step in steps] == [[0.5, 0, 0], [0.75, 0, 0]]


# The norm.


def test_the_next_norm_by_hand():
    # Norms 1, 2, 3, 10 and a norm of 4: three within, one beyond, 3/4 of the cohort.
    updates = [update(value, 0.0, 0.0) for value in (1.0, 2.0, 3.0, 10.0)]
    adaptive = AdaptiveNorm(quantile=0.5, learning_rate=1.0, count_noise=0.0)
    aggregator = rule(4.0, nominal_cohort=4.0, adaptive=adaptive)
    step, state = one_round(aggregator, updates)
    assert step["a"][0] == pytest.approx((1 + 2 + 3 + 4) / 4, rel=1e-5)
    assert aggregator.current_norm(state) == pytest.approx(4 * math.exp(-1 / 4))
    step, _ = aggregator.aggregate(updates, state)
    expected = (1 + 2 + 3 + 4 * math.exp(-1 / 4)) / 4
    assert step["a"][0] == pytest.approx(expected, rel=1e-5)


def test_who_does_not_answer_is_half_within():
    adaptive = AdaptiveNorm(quantile=0.5, learning_rate=1.0, count_noise=0.0)
    aggregator = rule(4.0, nominal_cohort=4.0, adaptive=adaptive)
    _, state = one_round(aggregator, [update(1.0, 0.0, 0.0)] * 2)
    # (1/2 + 1/2) / 4 + 1/2
    assert aggregator.current_norm(state) == pytest.approx(4 * math.exp(-1 / 4))
    _, state = one_round(aggregator, [])
    assert aggregator.current_norm(state) == 4.0


@pytest.mark.parametrize("first", [0.1, 5.0, 100.0])
@pytest.mark.parametrize(("quantile", "low", "high"), [(0.5, 10, 11), (0.9, 18, 19)])
def test_the_norm_converges_to_the_quantile(first, quantile, low, high):
    # Norms 1 to 20: half of them are within 10, nine tenths within 18.
    updates = [update(float(value), 0.0, 0.0) for value in range(1, 21)]
    adaptive = AdaptiveNorm(quantile, learning_rate=0.2, count_noise=1e-9)
    aggregator = rule(first, nominal_cohort=20.0, adaptive=adaptive)
    _, state = rounds(aggregator, 150, updates)
    reached = aggregator.current_norm(state)
    assert low / 1.02 <= reached <= high * 1.02


def test_the_norm_stays_within_public_bounds():
    for quantile, bound in ((0.99, NORM_RANGE), (0.01, 1 / NORM_RANGE)):
        adaptive = AdaptiveNorm(quantile, learning_rate=1e4, count_noise=0.0)
        aggregator = rule(2.0, adaptive=adaptive)
        _, state = rounds(aggregator, 3)
        assert aggregator.current_norm(state) == pytest.approx(2.0 * bound)


def test_the_count_is_paid_for():
    assert split_noise(3.0, 2.5) == pytest.approx(3.75)  # 1/9 = 1/3.75^2 + 1/5^2
    assert split_noise(0.0, 0.1) == 0.0
    assert split_noise(1.0, 1e9) == pytest.approx(1.0)


@given(st.floats(0.05, 100), st.floats(1.001, 1000))
def test_updates_and_count_together_are_one_release(noise_multiplier, excess):
    count_noise = excess * noise_multiplier / 2
    own = split_noise(noise_multiplier, count_noise)
    # A client moves the first by one norm, the second by 1/2.
    together = math.hypot(1 / own, 0.5 / count_noise)
    assert own > noise_multiplier
    assert together == pytest.approx(1 / noise_multiplier, rel=1e-9)


@pytest.mark.parametrize("count_noise", [0.0, 1.0, 1.5])
def test_a_count_that_costs_all_is_refused(count_noise):
    with pytest.raises(ValueError, match=r"noise_multiplier / 2 = 1\.5, got"):
        split_noise(3.0, count_noise)
    adaptive = AdaptiveNorm(0.5, 0.2, count_noise)
    with pytest.raises(ValueError, match=r"noise_multiplier / 2 = 1\.5, got"):
        rule(noise_multiplier=3.0, adaptive=adaptive)


@pytest.mark.parametrize(
    ("factor", "accepted"), [(1, True), (2 / 3, False), (1.5, False)]
)
def test_the_updates_get_the_noise_that_the_count_leaves(factor, accepted):
    aggregator = rule(0.5, 3.0, adaptive=AdaptiveNorm(0.5, 0.2, count_noise=2.5))
    noise = noise_of(aggregator, [], 20_000)
    test = stats.kstest(noise.numpy(), stats.norm(0, 0.5 * 3.75 * factor).cdf)
    assert (test.pvalue > LEVEL) == accepted


@pytest.mark.parametrize(
    ("factor", "accepted"), [(1, True), (2 / 3, False), (1.5, False)]
)
def test_the_count_gets_its_noise(factor, accepted):
    # With quantile 1/2 and no updates the logarithm of the norm moves by the noise.
    adaptive = AdaptiveNorm(0.5, learning_rate=0.01, count_noise=2.5)
    aggregator = rule(noise_multiplier=1.0, nominal_cohort=10.0, adaptive=adaptive)
    norms, state = [1.0], aggregator.init(LIKE)
    for _ in range(2000):
        _, state = aggregator.aggregate([], state)
        norms.append(aggregator.current_norm(state))
    logs = torch.tensor(norms, dtype=torch.float64).log()
    noise = logs.diff() * 10 / 0.01
    test = stats.kstest(noise.numpy(), stats.norm(0, 2.5 * factor).cdf)
    assert (test.pvalue > LEVEL) == accepted


# Correlated rounds.


def test_banded_rounds_carry_the_banded_noise():
    aggregator = rule(0.5, 3.0, 4.0, banded=Banded(rounds=6, bands=3))
    steps, _ = rounds(aggregator, 6)
    banded = Banded(rounds=6, bands=3)
    state = banded.init(3)
    for server_round, step in enumerate(steps, start=1):
        fresh = seeded(server_round).gaussian(3)
        noise, state = banded.correlate(fresh, server_round, state)
        released = step.double() * 4
        assert torch.equal(released % grid(1.5), torch.zeros(3).double())
        assert bool(((released - 1.5 * noise).abs() <= grid(1.5) / 2).all())


def test_one_band_is_the_plain_mechanism_bit_for_bit():
    updates = [update(1.0, 2.0, 3.0)]
    plain, _ = rounds(rule(noise_multiplier=2.0), 4, updates)
    banded = Banded(rounds=4, bands=1)
    one, _ = rounds(rule(noise_multiplier=2.0, banded=banded), 4, updates)
    assert all(map(torch.equal, plain, one))


def test_all_rounds_together_carry_less_noise():
    like = {"w": torch.zeros(2000)}
    deviations = [
        torch.stack(rounds(rule(noise_multiplier=1.0, banded=banded), 50, (), like)[0])
        .sum(0)
        .std()
        for banded in (None, Banded(rounds=50, bands=50))
    ]
    assert deviations[0] == pytest.approx(math.sqrt(50), rel=0.1)
    assert deviations[1] < deviations[0] / 2


def test_rounds_beyond_the_plan_are_refused():
    aggregator = rule(noise_multiplier=1.0, banded=Banded(rounds=2, bands=2))
    _, state = rounds(aggregator, 2)
    with pytest.raises(ValueError, match="round of 1 to 2, got 3"):
        aggregator.aggregate([], state)


def test_an_adaptive_norm_scales_the_correlated_noise_of_its_round():
    banded, adaptive = Banded(rounds=3, bands=2), AdaptiveNorm(0.9, 1.0, 2.5)
    aggregator = rule(1.0, 3.0, adaptive=adaptive, banded=banded)
    state, history = aggregator.init(LIKE), banded.init(3)
    for server_round in (1, 2, 3):
        deviation = 3.75 * aggregator.current_norm(state)
        step, state = aggregator.aggregate([], state)
        fresh = seeded(server_round).gaussian(3)
        noise, history = banded.correlate(fresh, server_round, history)
        error = flatten(step).double() - deviation * noise
        assert bool((error.abs() <= grid(deviation) / 2).all())
    assert aggregator.current_norm(state) != 1.0


# The state.


@pytest.mark.parametrize("adaptive", [None, AdaptiveNorm(0.5, 0.2, 1.0)])
@pytest.mark.parametrize("banded", [None, Banded(5, 1), Banded(5, 3)])
def test_the_state_goes_through_a_file_and_on_bit_for_bit(adaptive, banded):
    aggregator = rule(1.0, 1.0, 2.0, adaptive=adaptive, banded=banded)
    straight, state_of_all = rounds(aggregator, 5, [update(1.0, 2.0, 3.0)])
    state = aggregator.init(LIKE)
    for expected in straight:
        # A file gives its tensors back in an order of its own.
        state = dict(reversed(load(save(state)).items()))
        kept = {name: tensor.clone() for name, tensor in state.items()}
        before = state
        step, state = aggregator.aggregate([update(1.0, 2.0, 3.0)], state)
        assert torch.equal(flatten(step), expected)
        assert_equal(before, kept)
    assert_equal(state, state_of_all)
    assert state["server_round"].dtype == torch.int64
    assert state["server_round"].item() == 5


def test_the_state_holds_no_values_of_the_model():
    state = rule().init({"w": torch.ones(1000)})
    assert sum(tensor.numel() for tensor in state.values()) == 1


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0, 1.0), "clipping_norm > 0, got 0.0"),
        ((math.nan, 1.0, 1.0), "clipping_norm > 0, got nan"),
        ((math.inf, 1.0, 1.0), "finite clipping_norm"),
        ((1.0, -1.0, 1.0), "noise_multiplier >= 0"),
        ((1.0, math.nan, 1.0), "noise_multiplier >= 0"),
        ((1.0, 1.0, 0.0), "nominal_cohort > 0"),
        ((1.0, 1.0, math.inf), "nominal_cohort > 0"),
    ],
)
def test_what_would_make_an_epsilon_wrong_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrivateMean(*arguments, seeded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.2, 1.0), "quantile < 1, got 1.0"),
        ((0.5, 0.0, 1.0), "learning_rate > 0, got 0.0"),
        ((0.5, 0.2, -1.0), "count_noise >= 0, got -1.0"),
    ],
)
def test_an_adaptive_norm_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveNorm(*arguments)


def test_an_infinite_norm_cannot_adapt():
    with pytest.raises(ValueError, match="finite clipping_norm"):
        rule(math.inf, adaptive=AdaptiveNorm(0.5, 0.2, 1.0))
