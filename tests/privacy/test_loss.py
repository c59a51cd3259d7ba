"""A step's profile against integrals over real data sets, and the grid above it."""

import itertools
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.privacy.loss import added, largest_loss, removed, step_loss

EPSILONS = np.array([0.0, 1e-4, 0.01, 0.1, 0.5, 1.0, 3.0, 10.0])


def divergence(first, second, noise, value):
    """Hockey-stick divergence of two mixtures of Gaussians, given by their centres."""
    x = np.linspace(-12 * noise - 5, 12 * noise + 5, 40_001)

    def density(centres):
        scaled = (x[:, None] - np.array(centres)) / noise
        return np.exp(-0.5 * scaled**2).mean(axis=1) / (noise * math.sqrt(2 * math.pi))

    excess = density(first) - math.exp(value) * density(second)
    return float(np.trapezoid(np.maximum(excess, 0), x))


@pytest.mark.parametrize("tenths", [1, 5, 9, 10])
@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_poisson_profiles_equal_the_integrals(noise, tenths):
    without, with_one = [0.0], [0.0] * (10 - tenths) + [1.0] * tenths
    for value in EPSILONS:
        one = np.array([value])
        gone = divergence(with_one, without, noise, value)
        new = divergence(without, with_one, noise, value)
        assert removed(one, noise, tenths / 10)[0] == pytest.approx(gone, abs=1e-6)
        assert added(one, noise, tenths / 10)[0] == pytest.approx(new, abs=1e-6)


values = st.floats(-1, 1)


@settings(max_examples=60, deadline=None)
@given(
    others=st.lists(values, min_size=1, max_size=4),
    mine=values,
    yours=values,
    drawn=st.integers(1, 5),
    noise=st.floats(0.4, 5),
    epsilon=st.floats(0, 3),
)
def test_no_two_data_sets_exceed_the_profile_of_fixed_samples(
    others, mine, yours, drawn, noise, epsilon
):
    drawn = min(drawn, len(others) + 1)

    def sums(data):
        return [sum(sample) for sample in itertools.combinations(data, drawn)]

    rate = drawn / (len(others) + 1)
    allowed = removed(np.array([epsilon]), noise / 2, rate)[0]
    reached = divergence(sums([mine, *others]), sums([yours, *others]), noise, epsilon)
    assert reached <= allowed + 1e-6


def test_a_replaced_unit_among_opposite_ones_reaches_that_profile():
    # Whenever it is drawn, or one of the others in its place, the sums differ by 2.
    without, with_one = [-1.0, -1.0], [1.0, -1.0]
    reached = divergence(with_one, without, 1.0, 0.7)
    assert removed(np.array([0.7]), 0.5, 0.5)[0] == pytest.approx(reached, abs=1e-6)


@pytest.mark.parametrize(
    ("noise", "rate"), [(0.3, 0.9), (0.6, 0.01), (1.0, 0.1), (20.0, 1.0), (4.0, 0.5)]
)
def test_the_grid_is_that_of_the_library_on_both_sides(noise, rate):
    ours = step_loss(noise, rate, "poisson", interval=0.01, tail=1e-15)
    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=0.01,
        log_mass_truncation_bound=math.log(1e-15),
    )
    for value in (*-EPSILONS, *EPSILONS):
        reached = ours.get_delta_for_epsilon(float(value))
        expected = theirs.get_delta_for_epsilon(float(value))
        assert reached == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
@pytest.mark.parametrize("rate", [1e-8, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0, 500.0])
def test_the_grid_is_nowhere_below_the_profile(noise, rate, sampling):
    highest = largest_loss(noise, rate, 1e-12)
    loss = step_loss(noise, rate, sampling, interval=highest / 500, tail=1e-12)
    for value in np.linspace(0, 1.1 * highest, 37):
        profile = removed(np.array([value]), noise, rate)[0]
        assert loss.get_delta_for_epsilon(float(value)) >= profile * (1 - 1e-9) - 1e-18
