"""Trade-off functions against closed forms and integrals, and which way they err."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, special

from fedpeft.privacy import (
    Composition,
    epsilon,
    gaussian_trade_off,
    reconstruction_bound,
    trade_off,
)

RATES = np.concatenate([np.logspace(-6, -1, 20), np.linspace(0.1, 1.0, 19)])


def one_step(noise, rate):
    """A sampled step's exact curve, type I at the absent unit, and its inverse."""

    def type_two(threshold):
        present = special.ndtr((threshold - 1) / noise)
        return (1 - rate) * special.ndtr(threshold / noise) + rate * present

    def forth(type_one):
        return type_two(-noise * special.ndtri(type_one))

    def back(type_one):
        def excess(threshold):
            return type_two(threshold) - type_one

        threshold = optimize.brentq(excess, -50 * noise, 50 * noise + 1)
        return special.ndtr(-threshold / noise)

    return forth, back


@pytest.mark.parametrize(
    ("noise", "steps"), [(0.5, 1), (1.0, 1), (4.0, 1), (4.0, 100), (10.0, 1000)]
)
def test_releases_of_everything_are_just_below_the_closed_form(noise, steps):
    ours = trade_off(Composition(noise, 1.0, steps))
    exact = gaussian_trade_off(math.sqrt(steps) / noise)
    for rate in RATES:
        assert exact(rate) - 5e-4 <= ours(rate) <= exact(rate)


@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.1), (1.0, 0.3), (2.0, 0.01)])
def test_one_sampled_step_is_just_below_both_directions(noise, rate):
    ours = trade_off(Composition(noise, rate, 1))
    forth, back = one_step(noise, rate)
    for type_one in RATES[:-1]:
        assert ours(type_one) <= forth(type_one) + 1e-12
        assert ours(type_one) <= back(type_one) + 1e-12
    # The worse direction is nearly reached: where one curve leaves the other, the
    # symmetric function is a common tangent, below both.
    assert ours(1e-4) > min(forth(1e-4), back(1e-4)) - 5e-4
    assert ours(0.9) > min(forth(0.9), back(0.9)) - 5e-4


@given(
    st.floats(0.3, 5.0),
    st.floats(0.001, 1.0),
    st.integers(1, 50),
    st.floats(1e-6, 0.5),
    st.sampled_from(["poisson", "fixed"]),
)
def test_no_curve_claims_more_than_the_accountant(noise, rate, steps, delta, sampling):
    composition = Composition(noise, rate, steps, sampling)
    curve, spent = trade_off(composition), epsilon([composition], delta)
    for type_one in (1e-4, 0.01, 0.2):
        # What (epsilon, delta) allows; 0.2 % is the error of both grids.
        tangent = 1 - delta - math.exp(min(1.002 * spent, 700.0)) * type_one
        assert curve(type_one) >= tangent - 1e-4


@given(st.floats(0.3, 5.0), st.floats(0.001, 1.0), st.integers(1, 50))
def test_curves_are_convex_fall_and_are_their_own_inverse(noise, rate, steps):
    curve = trade_off(Composition(noise, rate, steps))
    values = np.array([curve(rate) for rate in np.linspace(0, 1, 51)])
    assert (np.diff(values) <= 0).all()
    assert (np.diff(values, 2) >= -1e-12).all()
    assert values[0] <= 1.0
    assert values[-1] == 0.0
    there = curve(0.1)
    assert there == 0 or curve(there) == pytest.approx(0.1, abs=1e-6)


def test_more_noise_is_harder_to_see_and_more_steps_are_easier():
    def at(noise, steps):
        return trade_off(Composition(noise, 0.1, steps))(0.01)

    assert at(0.5, 100) < at(1.0, 100) < at(2.0, 100) < 0.99
    assert at(1.0, 1000) < at(1.0, 100) < at(1.0, 10) < 0.99


def test_no_release_is_blind_guessing_and_no_noise_is_no_privacy():
    assert trade_off(Composition(0.0, 0.5, 0))(0.25) == pytest.approx(0.75)
    assert trade_off(Composition(0.0, 0.5, 1))(0.01) == 0.0


def test_replacing_a_unit_is_adding_one_at_half_the_noise():
    fixed = trade_off(Composition(2.0, 1.0, 10, "fixed"))
    poisson = trade_off(Composition(1.0, 1.0, 10, "poisson"))
    assert fixed(0.05) == poisson(0.05)


def test_a_thousand_steps_take_less_than_two_seconds():
    trade_off.cache_clear()
    start = time.perf_counter()
    trade_off(Composition(1.0, 0.0625, 1000))
    assert time.perf_counter() - start < 2


def test_success_of_a_gaussian_release_is_the_closed_form():
    spent = Composition(noise_multiplier=1.0, sampling_rate=1.0, steps=1)
    expected = special.ndtr(special.ndtri(0.001) + 1)
    assert reconstruction_bound(spent, 0.001) == pytest.approx(expected, abs=2e-4)
    assert reconstruction_bound(spent, 0.001) >= expected


def test_the_best_adversary_stays_below_the_bound_and_comes_close():
    """Naming one of 10 coordinates: the largest one is the best guess there is."""
    noise, candidates = 1.0, 10
    others = candidates - 1

    def wins(x):
        density = math.exp(-0.5 * (x - 1) ** 2) / math.sqrt(2 * math.pi)
        return density * special.ndtr(x) ** others

    success = integrate.quad(wins, -10, 11)[0]
    bound = reconstruction_bound(Composition(noise, 1.0, 1), 1 / candidates)
    assert 0.1 < success <= bound < success + 0.1


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_success_that_is_certain_or_impossible_stays_so(prior):
    spent = Composition(1.0, 0.1, 10)
    assert reconstruction_bound(spent, prior) == pytest.approx(prior, abs=1e-8)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(rate):
    for curve in (
        gaussian_trade_off(1.0),
        trade_off(Composition(1.0, 0.1, 1)),
        trade_off(Composition(0.0, 0.1, 1)),
    ):
        with pytest.raises(ValueError, match="Expected a probability between 0 and 1"):
            curve(rate)


def test_what_cannot_be_accounted_is_refused():
    with pytest.raises(ValueError, match="Expected at most 1000000 steps in all"):
        trade_off(Composition(1.0, 0.1, 1_000_001))
    with pytest.raises(ValueError, match="Expected a finite mu >= 0, got nan"):
        gaussian_trade_off(math.nan)
