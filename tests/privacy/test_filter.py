"""The filter: never past the plain composition, and a theorem where that is none."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from fedpeft.privacy.accountant import Composition, epsilon
from fedpeft.privacy.calibration import calibrate, max_steps
from fedpeft.privacy.filter import _divergence, admits, renyi_budget, renyi_order

DELTA = 1e-5

compositions = st.builds(
    Composition,
    noise_multiplier=st.sampled_from([0.0, 0.7, 1.0, 2.0, 5.0, 20.0]),
    sampling_rate=st.sampled_from([0.01, 0.1, 1.0]),
    steps=st.sampled_from([0, 1, 5, 40]),
    sampling=st.sampled_from(["poisson"] * 4 + ["fixed"]),
)
histories = st.lists(compositions, max_size=4)
budgets = st.sampled_from([0.5, 2.0, 8.0, 30.0])


def is_admitted(history, release, budget=8.0):
    return admits(history, release, budget_epsilon=budget, delta=DELTA)


@settings(max_examples=150, deadline=None)
@given(history=histories, release=compositions, budget=budgets)
def test_nothing_is_admitted_that_plain_composition_would_not(history, release, budget):
    if not is_admitted(history, release, budget):
        return
    happened = [done for done in (*history, release) if done.steps]
    assert len({done.relation for done in happened}) <= 1
    assert all(done.noise_multiplier > 0 for done in happened)
    assert epsilon(happened, DELTA) <= budget


@settings(max_examples=80, deadline=None)
@given(history=histories, release=compositions, budget=budgets, data=st.data())
def test_what_is_admitted_is_admitted_after_less(history, release, budget, data):
    if not is_admitted(history, release, budget):
        return
    less = [
        dataclasses.replace(done, steps=data.draw(st.integers(0, done.steps)))
        for done in history
    ]
    assert is_admitted(less, release, budget)
    assert is_admitted(history[1:], release, budget)


@settings(max_examples=50, deadline=None)
@given(history=histories, release=compositions)
def test_entries_without_steps_change_nothing(history, release):
    nothing = [Composition(0.0, 0.5, 0), Composition(3.0, 0.5, 0, "fixed")]
    assert is_admitted([*history, *nothing], release) == is_admitted(history, release)
    for empty in nothing:
        spent = is_admitted(history[:-1], history[-1]) if history else True
        assert is_admitted(history, empty) == spent


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.0, 0.0625, 16), (5.0, 1.0, 1), (2.0, 0.1, 1)]
)
def test_equal_parameters_are_admitted_up_to_the_last_that_fits(noise, rate, steps):
    fit = max_steps(noise, rate, target_epsilon=8.0, target_delta=DELTA)
    one = Composition(noise, rate, steps)
    before = [one] * (fit // steps - 1)
    assert is_admitted(before, one)
    assert not is_admitted([*before, one], one)


def test_other_parameters_are_admitted_up_to_the_closed_form():
    # Without sampling a step's divergence is order / (2 noise^2): 3 / 32, then 3 / 18,
    # of a budget of 3.198.
    assert renyi_order(8.0, DELTA) == 3
    assert renyi_budget(3, 8.0, DELTA) == pytest.approx(3.198, abs=1e-3)
    history = [Composition(4.0, 1.0, 16)]
    assert is_admitted(history, Composition(3.0, 1.0, 10))  # 1.5 + 1.667 = 3.167
    assert not is_admitted(history, Composition(3.0, 1.0, 11))  # 1.5 + 1.833 = 3.333
    # 38 equal steps diverge by 3.56, but nobody chose: plain composition decides.
    assert is_admitted(history, Composition(4.0, 1.0, 22))


@pytest.mark.parametrize("budget", [0.1, 1.0, 8.0, 20.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.0625, 96), (0.1, 1000), (1.0, 100)])
def test_a_second_run_of_other_noise_may_use_the_rest(rate, steps, budget):
    noise = calibrate(rate, steps, target_epsilon=budget, target_delta=DELTA)
    first = Composition(noise, rate, steps // 2)
    assert is_admitted([first], Composition(1.1 * noise, rate, steps // 8), budget)


@pytest.mark.parametrize("budget", [0.01, 0.3, 3.0, 8.0, 40.0])
def test_the_renyi_budget_implies_the_budget_for_a_gaussian(budget):
    order = renyi_order(budget, DELTA)
    distance = math.sqrt(2 * renyi_budget(order, budget, DELTA) / order)
    upper = special.ndtr(distance / 2 - budget / distance)
    lower = special.ndtr(-distance / 2 - budget / distance)
    assert upper - math.exp(budget) * lower <= DELTA


@pytest.mark.parametrize("order", [2, 3, 7])
@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.01), (1.0, 0.5), (8.0, 1.0)])
def test_the_divergence_equals_the_integral(noise, rate, order):
    def integrand(x):
        loss = np.log1p(rate * np.expm1((x - 0.5) / noise**2))
        density = -0.5 * (x / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi))
        return np.exp(density + order * loss)

    mass, _ = integrate.quad(integrand, -10 * noise, 10 * noise + order, limit=500)
    expected = math.log(mass) / (order - 1)
    one = Composition(noise, rate, 1)
    assert _divergence(one, order) == pytest.approx(expected, rel=1e-6)


def test_no_release_without_noise_is_admitted():
    silent = Composition(0.0, 1.0, 1)
    assert not is_admitted([], silent, budget=1e9)
    assert not is_admitted([silent], Composition(100.0, 0.1, 1), budget=1e9)


def test_releases_of_another_relation_are_refused():
    poisson, fixed = Composition(50.0, 0.1, 1), Composition(50.0, 0.1, 1, "fixed")
    assert is_admitted([poisson], poisson)
    assert is_admitted([fixed], fixed)
    assert not is_admitted([poisson], fixed)
    assert not is_admitted([fixed], poisson)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match="budget_epsilon > 0"):
        is_admitted([], Composition(1.0, 0.1, 1), budget)
