"""The accountant against a table, another library, integrals and closed forms."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy import integrate, special

from fedpeft.errors import ConfigError
from fedpeft.privacy.accountant import MAX_STEPS, Composition, epsilon
from fedpeft.privacy.calibration import (
    MAX_NOISE_MULTIPLIER,
    MIN_NOISE_MULTIPLIER,
    TargetOutOfReach,
    calibrate,
    max_steps,
)

ERROR = 1e-3  # what the grid may add, relative


def spent(noise, rate, steps, delta=1e-5):
    return epsilon([Composition(noise, rate, steps)], delta)


def closed_form_delta(distance, value):
    """Balle & Wang (2018), theorem 8: a Gaussian release at `distance` deviations."""
    upper = special.log_ndtr(distance / 2 - value / distance)
    lower = value + special.log_ndtr(-distance / 2 - value / distance)
    return math.exp(upper) * -math.expm1(lower - upper)


def hockey_stick(noise, rate, value):
    """One step's delta at an epsilon, the worse direction, by direct integration."""

    def without(x):
        return math.exp(-0.5 * (x / noise) ** 2) / (noise * math.sqrt(2 * math.pi))

    def with_one(x):
        return (1 - rate) * without(x) + rate * without(x - 1)

    def divergence(first, second):
        return integrate.quad(
            lambda x: max(0.0, first(x) - math.exp(value) * second(x)),
            -40 * noise,
            40 * noise + 1,
            points=list(np.linspace(-8 * noise, 8 * noise + 1, 90)),
            limit=2000,
            epsabs=1e-14,
            epsrel=1e-10,
        )[0]

    return max(divergence(with_one, without), divergence(without, with_one))


# The PLD column of a table made with another script at a grid of its own; the rate is
# batch / examples, the steps are floor(epochs * examples / batch).
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "expected"),
    [
        (0.6, 64 / 1000, 312, 1e-5, 24.17),
        (1.0, 64 / 1000, 312, 1e-5, 7.73),
        (2.0, 64 / 1000, 312, 1e-5, 2.59),
        (1.0, 256 / 5000, 976, 1e-5, 11.14),
        (1.0, 32 / 200, 62, 1e-4, 7.68),
        (1.0, 1024 / 50000, 488, 1e-5, 2.81),
    ],
)
def test_golden_values(noise, rate, steps, delta, expected):
    assert spent(noise, rate, steps, delta) == pytest.approx(expected, rel=2e-3)


def prv_bounds(history, delta):
    """Gopi et al. (2021) as Opacus has it: a lower and an upper bound."""
    accountant = PRVAccountant()
    accountant.history = history
    tolerated = delta / 1000
    composed = accountant._get_dprv(eps_error=0.01, delta_error=tolerated)
    lower, _, upper = composed.compute_epsilon(delta, tolerated, 0.01)
    return lower, upper


# Settings of all three units, from 1 to 1,000 rounds. An example or a person is in a
# step's batch with its rate, many steps a round; a client is in the one step of a round
# with the rate of a secret cohort, or at rate 1 in a public rotation.
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Optimal order is the largest:UserWarning")
@pytest.mark.parametrize(
    ("unit", "rounds", "steps_a_round", "noise", "rate"),
    [
        ("example", 1, 16, 1.0, 1 / 16),
        ("example", 6, 16, 0.75, 1 / 16),
        ("example", 20, 16, 1.0, 1 / 16),
        ("example", 100, 16, 2.0, 1 / 16),
        ("example", 1000, 16, 5.0, 1 / 16),
        ("example", 60, 1, 5.0, 1.0),
        ("person", 1, 4, 1.2, 1 / 4),
        ("person", 20, 4, 2.0, 1 / 4),
        ("person", 300, 8, 3.0, 1 / 8),
        ("client", 1, 1, 0.8, 0.1),
        ("client", 100, 1, 1.5, 0.1),
        ("client", 1000, 1, 2.05, 0.1),
        ("client", 1000, 1, 0.8, 0.01),
        ("client", 1, 1, 1.0, 1.0),
        ("client", 1000, 1, 30.0, 1.0),
    ],
)
def test_opacus_prv_brackets_epsilon(unit, rounds, steps_a_round, noise, rate):
    history = [Composition(noise, rate, steps_a_round)] * rounds
    lower, upper = prv_bounds([(noise, rate, rounds * steps_a_round)], 1e-5)

    assert lower <= epsilon(history, 1e-5) <= upper


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ([(0.6, 0.064, 312)], 1e-5),
        ([(0.8, 0.01, 1000)], 1e-6),
        ([(0.7, 0.001, 500)], 1e-5),
        ([(5.0, 0.5, 200)], 1e-7),
        ([(1.0, 0.16, 1)], 1e-4),
        ([(1.0, 0.05, 100), (1.5, 0.1, 60), (3.0, 0.25, 20)], 1e-5),
    ],
)
def test_opacus_prv_brackets_other_deltas_and_mixed_histories(history, delta):
    lower, upper = prv_bounds(history, delta)

    assert lower <= epsilon([Composition(*done) for done in history], delta) <= upper


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.01), (1.0, 0.2), (4.0, 0.7)])
def test_one_step_equals_the_integral_from_above(noise, rate, delta):
    value = spent(noise, rate, 1, delta)

    assert hockey_stick(noise, rate, value) <= delta * (1 + 1e-6)
    if value > 0:
        assert hockey_stick(noise, rate, value * (1 - ERROR)) > delta


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize(
    ("noise", "steps"), [(0.2, 1), (0.5, 1000), (1.0, 1), (5.0, 20), (50.0, 1)]
)
def test_without_sampling_it_equals_the_closed_form_from_above(noise, steps, delta):
    distance = math.sqrt(steps) / noise
    value = spent(noise, 1.0, steps, delta)

    assert closed_form_delta(distance, value) <= delta
    if value > 0:
        assert closed_form_delta(distance, value * (1 - ERROR)) > delta


@pytest.mark.parametrize(
    ("noise", "steps", "delta"), [(5.0, 1000, 2e-12), (1000.0, 100_000, 1e-9)]
)
def test_rounding_of_long_compositions_never_lowers_it(noise, steps, delta):
    value = spent(noise, 1.0, steps, delta)
    assert closed_form_delta(math.sqrt(steps) / noise, value) <= delta


def test_epsilon_is_zero_exactly_where_delta_pays_for_everything():
    distance = 0.01
    free = closed_form_delta(distance, 0.0)
    assert spent(1 / distance, 1.0, 1, free * 1.001) == 0.0
    assert 0 < spent(1 / distance, 1.0, 1, free * 0.99) < 1e-3


def test_sampling_nearly_all_costs_no_more_than_all():
    # Losses of hundreds, where an inversion by summing up from the tail overflows.
    assert spent(0.4, 0.93, 378) <= spent(0.4, 1.0, 378)


def test_ten_rounds_are_accounted_as_one_composition():
    rounds = [Composition(1.1, 0.05, 16) for _ in range(10)]
    assert epsilon(rounds, 1e-5) == spent(1.1, 0.05, 160)
    assert epsilon(rounds, 1e-5) < 10 * spent(1.1, 0.05, 16)


def test_one_client_over_twenty_rounds_is_one_composition_not_twenty():
    # An accountant made anew each round says 2.24, and the sum of its answers 44.9.
    rounds = [Composition(1.0, 0.0625, 16)] * 20
    assert epsilon(rounds[:1], 1e-5) == pytest.approx(2.24, abs=0.01)
    assert epsilon(rounds, 1e-5) == spent(1.0, 0.0625, 320)
    assert epsilon(rounds, 1e-5) == pytest.approx(7.63, abs=0.01)


def test_order_does_not_matter():
    history = [Composition(1.0, 0.1, 5), Composition(2.0, 0.3, 7)]
    assert epsilon(history, 1e-5) == epsilon(history[::-1], 1e-5)


def test_different_parameters_cost_between_the_worst_part_and_the_sum():
    parts = [Composition(1.0, 0.1, 30), Composition(3.0, 0.5, 10)]
    together = epsilon(parts, 1e-5)
    assert together > max(epsilon([part], 1e-5) for part in parts)
    assert together < sum(epsilon([part], 0.5e-5) for part in parts)


def test_a_release_without_noise_costs_everything():
    assert (
        epsilon([Composition(1.0, 0.1, 3), Composition(0.0, 0.1, 1)], 0.1) == math.inf
    )


def test_next_to_no_noise_counts_as_none():
    assert spent(0.009, 1e-9, 1) == math.inf
    assert spent(1e-300, 1.0, 1) == math.inf


def test_a_tiny_rate_errs_upward():
    assert spent(0.1, 1e-15, 1, 1e-9) == spent(0.1, 1e-8, 1, 1e-9) > 0


def test_no_release_costs_nothing():
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([Composition(0.0, 1.0, 0)], 1e-5) == 0.0


# Clients, cohort and rounds of a table made with dp-accounting's Renyi accountant for
# sampling without replacement, whose bound is `loose`.
@pytest.mark.parametrize(
    ("clients", "cohort", "rounds", "noise", "loose"),
    [
        (10_000, 100, 500, 0.814, 48.9),
        (10_000, 100, 500, 2.0, 2.31),
        (1_000, 100, 100, 2.0, 11.5),
    ],
)
def test_fixed_cohorts_cost_more_than_poisson_ones_and_less_than_renyi_says(
    clients, cohort, rounds, noise, loose
):
    rate, delta = cohort / clients, clients**-1.1
    value = epsilon([Composition(noise, rate, rounds, "fixed")], delta)

    assert 3 * spent(noise, rate, rounds, delta) < value < loose / 1.6
    # If all clients send the same and one may send the opposite, the sum moves by twice
    # the clipping norm just when that one is drawn: such data do cost that much.
    least = spent(noise / 2, rate, rounds, delta) * (1 - ERROR)
    assert least < value < 1.2 * least


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 4), (40.0, 1000)])
def test_a_fixed_sample_of_everybody_equals_the_closed_form_from_above(noise, steps):
    # Who is replaced moves the sum by twice the clipping norm.
    distance = 2 * math.sqrt(steps) / noise
    value = epsilon([Composition(noise, 1.0, steps, "fixed")], 1e-5)

    assert closed_form_delta(distance, value) <= 1e-5
    assert closed_form_delta(distance, value * (1 - ERROR)) > 1e-5
    assert value == epsilon([Composition(noise / 2, 1.0, steps)], 1e-5)


def test_relations_are_told_apart_and_never_added():
    poisson, fixed = Composition(1.0, 0.1, 3), Composition(1.0, 0.1, 3, "fixed")
    assert (poisson.relation, fixed.relation) == ("add-or-remove-one", "replace-one")
    with pytest.raises(ValueError, match="different relations are never added"):
        epsilon([poisson, fixed], 1e-5)


@pytest.mark.parametrize(
    ("rate", "steps", "target"), [(0.1, 100, 8.0), (0.01, 1000, 1.0), (1.0, 10, 3.0)]
)
def test_noise_for_fixed_samples_is_calibrated_and_inverted(rate, steps, target):
    goal = {"target_epsilon": target, "target_delta": 1e-5, "sampling": "fixed"}
    noise = calibrate(rate, steps, **goal)
    value = epsilon([Composition(noise, rate, steps, "fixed")], 1e-5)

    assert target * 0.9875 < value <= target
    assert noise > calibrate(rate, steps, target_epsilon=target, target_delta=1e-5)
    assert max_steps(noise, rate, **goal) in range(steps, steps + 2)


def test_a_thousand_rounds_are_accounted_in_seconds():
    before = time.process_time()
    for rate, steps in [(0.01, 1000), (0.0625, 16_000), (0.1, 1000), (1.0, 1000)]:
        noise = calibrate(rate, steps, target_epsilon=4.0, target_delta=1.1e-5)
        assert max_steps(noise, rate, target_epsilon=4.0, target_delta=1.1e-5) >= steps
    entries = [Composition(2.0 + i / 1000, 0.1, 1) for i in range(1000)]
    assert epsilon(entries, 1.1e-5) > spent(3.0, 0.1, 1000)
    assert time.process_time() - before < 30  # 4 s where it was written


noises = st.floats(0.4, 60)
rates = st.floats(0.005, 1)
counts = st.integers(1, 300)
factors = st.floats(1.01, 3)


@settings(max_examples=10, deadline=None)
@given(noise=noises, rate=rates, steps=counts, factor=factors)
def test_epsilon_is_monotone(noise, rate, steps, factor):
    value = spent(noise, rate, steps)
    at_most = value * (1 + ERROR) + 1e-6
    at_least = value * (1 - ERROR) - 1e-6

    assert spent(noise * factor, rate, steps) <= at_most
    assert spent(noise, rate, steps, delta=1e-5 * factor) <= at_most
    assert spent(noise, min(1.0, rate * factor), steps) >= at_least
    assert spent(noise, rate, math.ceil(steps * factor)) >= at_least


@pytest.mark.parametrize(
    ("rate", "steps", "target", "delta"),
    [
        (0.25, 24, 8.0, 1e-5),
        (0.0625, 96, 8.0, 1e-5),
        (0.05, 1000, 8.0, 1e-5),
        (0.01, 300, 8.0, 1e-6),
        (1.0, 1, 8.0, 1e-5),
        (1.0, 1000, 8.0, 1e-5),
        (0.1, 1, 8.0, 1e-5),
        (0.25, 50, 1.0, 1e-5),
        (0.5, 20, 1.0, 1e-9),
        (0.1, 100, 0.1, 1e-5),
        (1.0, 1, 0.5, 1e-6),
        (0.1, 30, 0.001, 1e-5),
        (0.03, 60, 100.0, 1e-6),
    ],
)
def test_calibrated_noise_lands_just_under_the_target(rate, steps, target, delta):
    noise = calibrate(rate, steps, target_epsilon=target, target_delta=delta)
    assert target * 0.9875 < spent(noise, rate, steps, delta) <= target


def test_calibrated_noise_is_the_least_of_five_digits():
    noise = calibrate(0.05, 200, target_epsilon=8.0, target_delta=1e-5)
    assert noise == float(f"{noise:.5g}")
    assert spent(noise - 1e-4, 0.05, 200) > 8.0


def test_a_target_that_costs_nothing_takes_the_least_noise():
    noise = calibrate(1e-9, 10, target_epsilon=1.0, target_delta=1e-5)
    assert noise == MIN_NOISE_MULTIPLIER


def test_a_target_out_of_reach_names_the_steps_that_fit():
    with pytest.raises(TargetOutOfReach, match=r"100 steps .*: 33 steps fit") as caught:
        calibrate(0.1, 100, target_epsilon=0.001, target_delta=1e-5)
    assert issubclass(TargetOutOfReach, ConfigError)
    assert caught.value.max_steps == 33
    assert spent(MAX_NOISE_MULTIPLIER, 0.1, 33) <= 0.001
    assert spent(MAX_NOISE_MULTIPLIER, 0.1, 34) > 0.001


@pytest.mark.parametrize("target", [0.05, 1.0, 4.0])
def test_max_steps_is_the_last_that_fits(target):
    steps = max_steps(1.5, 0.1, target_epsilon=target, target_delta=1e-5)
    assert spent(1.5, 0.1, steps) <= target < spent(1.5, 0.1, steps + 1)


def test_max_steps_ends_where_accounting_does():
    # 1e-12 is twice the rounding of 562 steps; all of them together cost little.
    assert max_steps(1000.0, 0.1, target_epsilon=1.0, target_delta=1e-12) == 562
    assert max_steps(0.0, 0.1, target_epsilon=1.0, target_delta=1e-5) == 0


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "message"),
    [
        (-1.0, 0.1, 1, "noise_multiplier >= 0, got -1.0"),
        (math.nan, 0.1, 1, "noise_multiplier >= 0, got nan"),
        (math.inf, 0.1, 1, "finite noise_multiplier"),
        (1.0, 0.0, 1, "sampling_rate <= 1, got 0.0"),
        (1.0, 1.1, 1, "sampling_rate <= 1, got 1.1"),
        (1.0, math.nan, 1, "sampling_rate <= 1, got nan"),
        (1.0, 0.1, -1, "steps >= 0, got -1"),
        (1.0, 0.1, 1.5, "integer steps >= 0, got 1.5"),
    ],
)
def test_compositions_out_of_range_are_refused(noise, rate, steps, message):
    with pytest.raises(ValueError, match=message):
        Composition(noise, rate, steps)


def test_a_sampling_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="'poisson' or 'fixed', got 'shuffled'"):
        Composition(1.0, 0.1, 1, "shuffled")


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_out_of_range_is_refused(delta):
    with pytest.raises(ValueError, match="0 < delta < 1"):
        epsilon([], delta)


def test_a_delta_below_double_precision_is_refused():
    with pytest.raises(ValueError, match=r"delta >= 1.8e-12 for 1000 steps, got 1e-13"):
        spent(1.0, 0.1, 1000, 1e-13)


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="at most 1000000 steps"):
        spent(1.0, 0.1, MAX_STEPS + 1)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(ValueError, match="target_epsilon > 0"):
        calibrate(0.1, 10, target_epsilon=target, target_delta=1e-5)
    with pytest.raises(ValueError, match="target_epsilon > 0"):
        max_steps(1.0, 0.1, target_epsilon=target, target_delta=1e-5)
