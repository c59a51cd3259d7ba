"""Correlated noise: closed forms by hand, its price, its gain, its stream."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy import stats

from fedpeft.privacy.banded import (
    Banded,
    Drawn,
    best_bands,
    coefficients,
    factor,
    prefix_error,
)
from fedpeft.privacy.randomness import SeededRandomness
from simulations.benchmarks.banded import SETTINGS, measure

# A right generator fails a test of this level once in a million runs.
LEVEL = 1e-6


def fresh_noise(rounds, size, seed=0):
    return SeededRandomness(seed).gaussian(rounds * size).view(rounds, size)


def streamed(banded, fresh):
    """The noise of all rounds, one after another."""
    state, rows = banded.init(fresh.shape[1]), []
    for server_round, row in enumerate(fresh, start=1):
        noise, state = banded.correlate(row, server_round, state)
        rows.append(noise)
    return torch.stack(rows)


def sensitivity(pattern, rounds, bands):
    """Of a client in these rounds: its contributions all point one way, as C >= 0."""
    columns = factor(rounds, bands)[:, list(pattern)]
    return math.sqrt((columns.T @ columns).sum())


# The factor.


def test_squaring_the_coefficients_gives_those_of_the_prefix_sums():
    root = coefficients(50)
    np.testing.assert_allclose(np.convolve(root, root)[:50], np.ones(50))


def test_three_rounds_by_hand():
    # Columns 1, 1/2, 3/8; 1, 1/2; 1: each over its norm.
    first, second = math.sqrt(1 + 1 / 4 + 9 / 64), math.sqrt(1 + 1 / 4)
    expected = [
        [1 / first, 0, 0],
        [0.5 / first, 1 / second, 0],
        [0.375 / first, 0.5 / second, 1],
    ]
    np.testing.assert_allclose(factor(3, 3), expected, atol=1e-15)


def test_two_bands_by_hand():
    root = math.sqrt(5) / 2
    np.testing.assert_allclose(
        factor(3, 2), [[1 / root, 0, 0], [0.5 / root, 1 / root, 0], [0, 0.5 / root, 1]]
    )
    # z2 = root (f2 - f1 / 2), and the last column has nothing below it to share with.
    fresh = torch.tensor([[2.0], [3.0], [4.0]], dtype=torch.float64)
    expected = [2 * root, (3 - 1) * root, 4 - (3 - 1) / 2]
    noise = streamed(Banded(rounds=3, bands=2), fresh).flatten().tolist()
    assert noise == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("rounds", "bands"), [(1, 1), (5, 3), (8, 8), (40, 7)])
def test_the_factor_is_banded_and_its_columns_have_norm_one(rounds, bands):
    matrix = factor(rounds, bands)
    for row, column in itertools.product(range(rounds), repeat=2):
        assert (matrix[row, column] > 0) == (0 <= row - column < bands)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), np.ones(rounds))


# The price.


@given(
    st.integers(1, 6),
    st.integers(0, 5),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 7),
)
def test_rounds_far_enough_apart_cost_what_independent_releases_cost(
    bands, start, extra, after
):
    gaps = [bands + more for more in extra]
    pattern = np.cumsum([start, *gaps])
    rounds = max(bands, int(pattern[-1]) + 1 + after)
    cost = sensitivity(pattern, rounds, bands)
    assert cost == pytest.approx(math.sqrt(len(pattern)), rel=1e-12)


@given(st.integers(2, 6), st.integers(0, 5), st.data())
def test_nearer_rounds_cost_more(bands, start, data):
    gap = data.draw(st.integers(1, bands - 1))
    pattern = [start, start + gap, start + gap + bands]
    assert sensitivity(pattern, pattern[-1] + 2, bands) > math.sqrt(3) * (1 + 1e-3)


def test_no_allowed_pattern_costs_more_than_the_root_of_its_rounds():
    rounds, bands = 10, 3
    worst = [0.0] * 5
    for count in range(1, 5):
        for pattern in itertools.combinations(range(rounds), count):
            if all(b - a >= bands for a, b in itertools.pairwise(pattern)):
                cost = sensitivity(pattern, rounds, bands)
                worst[count] = max(worst[count], cost)
    assert worst == pytest.approx([math.sqrt(count) for count in range(5)])


# The gain.


@pytest.mark.parametrize("rounds", [1, 7, 100])
def test_one_band_is_independent_noise(rounds):
    np.testing.assert_array_equal(factor(rounds, 1), np.eye(rounds))
    # The variance after t rounds is t; its mean is (rounds + 1) / 2.
    assert prefix_error(rounds, 1) == pytest.approx(math.sqrt((rounds + 1) / 2))
    fresh = fresh_noise(rounds, 5)
    assert torch.equal(streamed(Banded(rounds, 1), fresh), fresh)


@pytest.mark.parametrize(("rounds", "bands"), [(2, 2), (30, 1), (30, 4), (30, 30)])
def test_the_error_is_that_of_the_inverted_matrix(rounds, bands):
    sums = np.tri(rounds) @ np.linalg.inv(factor(rounds, bands))
    expected = math.sqrt((sums**2).sum() / rounds)
    assert prefix_error(rounds, bands) == pytest.approx(expected, rel=1e-12)


def test_the_best_number_of_bands_is_the_best_of_all_candidates():
    chosen = best_bands(60, min_separation=12)
    assert chosen in {1, 2, 4, 8, 12}
    errors = [prefix_error(60, bands) for bands in (1, 2, 4, 8, 12)]
    assert prefix_error(60, chosen) == min(errors)


def test_the_best_number_of_bands_stays_within_separation_and_rounds():
    assert best_bands(1, min_separation=1) == 1
    assert best_bands(50, min_separation=1) == 1
    assert best_bands(5, min_separation=100) <= 5


# Rounds, participations, least separation -> how many times less noise.
LESS_NOISE = {
    (100, 1, 100): 3.1,
    (100, 5, 20): 2.8,
    (100, 10, 10): 2.3,
    (500, 10, 50): 4.4,
    (1000, 4, 250): 7.0,
    (1000, 20, 50): 4.8,
}


def test_correlated_noise_is_smaller_by_the_known_factors():
    rows = {
        (row["rounds"], row["participations"], row["min_separation"]): row
        for row in measure(coordinates=0)
    }
    assert set(rows) == set(SETTINGS) == set(LESS_NOISE)
    for setting, expected in LESS_NOISE.items():
        assert rows[setting]["times_less_noise"] == pytest.approx(expected, rel=0.05)
        assert rows[setting]["bands"] <= setting[2]


# The stream.


@given(st.integers(1, 40), st.data())
def test_the_stream_equals_the_dense_solution(rounds, data):
    bands = data.draw(st.integers(1, rounds))
    fresh = fresh_noise(rounds, 3)
    dense = np.linalg.solve(factor(rounds, bands), fresh.numpy())
    noise = streamed(Banded(rounds, bands), fresh)
    assert noise.dtype == torch.float64
    np.testing.assert_allclose(noise.numpy(), dense, rtol=0, atol=1e-10)


def test_rounding_errors_do_not_grow_over_a_thousand_rounds():
    fresh = fresh_noise(1000, 2)
    dense = np.linalg.solve(factor(1000, 50), fresh.numpy())
    noise = streamed(Banded(1000, 50), fresh)
    np.testing.assert_allclose(noise.numpy(), dense, rtol=0, atol=1e-10)


def test_the_stream_goes_on_bit_for_bit_from_a_file():
    banded, fresh = Banded(rounds=12, bands=4), fresh_noise(12, 33)
    state, rows = banded.init(33), []
    for server_round, row in enumerate(fresh, start=1):
        state = load(save(state))
        noise, state = banded.correlate(row, server_round, state)
        rows.append(noise)
    assert state["history"].shape == (3, 33)
    assert torch.equal(torch.stack(rows), streamed(banded, fresh))


def test_inputs_are_left_alone():
    banded, fresh = Banded(rounds=5, bands=3), fresh_noise(1, 4)[0]
    state = {"history": torch.ones(2, 4, dtype=torch.float64)}
    kept = fresh.clone()
    banded.correlate(fresh, 3, state)
    assert torch.equal(fresh, kept)
    assert bool((state["history"] == 1).all())


@pytest.mark.parametrize(
    ("factor_of_right", "accepted"), [(1, True), (2 / 3, False), (1.5, False)]
)
def test_prefix_sums_have_the_predicted_deviation_and_no_other(
    factor_of_right, accepted
):
    rounds, bands, size = 20, 5, 4000
    noise = streamed(Banded(rounds, bands), fresh_noise(rounds, size)).numpy()
    predicted = np.tri(rounds) @ np.linalg.inv(factor(rounds, bands))
    for t in (0, 1, bands, rounds - 1):
        deviation = np.linalg.norm(predicted[t]) * factor_of_right
        sums = noise[: t + 1].sum(0)
        test = stats.kstest(sums, stats.norm(0, deviation).cdf)
        assert (test.pvalue > LEVEL) == accepted


def test_coordinates_are_uncorrelated():
    noise = streamed(Banded(8, 4), fresh_noise(8, 40_000)).numpy()[-1]
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) * 200 < 6


# Refusals.


@pytest.mark.parametrize("server_round", [0, 4])
def test_a_round_that_was_not_planned_is_refused(server_round):
    banded = Banded(rounds=3, bands=2)
    with pytest.raises(ValueError, match=f"round of 1 to 3, got {server_round}"):
        banded.correlate(torch.zeros(1).double(), server_round, banded.init(1))


@pytest.mark.parametrize(("rounds", "bands"), [(3, 0), (3, 4), (0, 0)])
def test_bands_out_of_range_are_refused(rounds, bands):
    with pytest.raises(ValueError, match="1 <= bands <= rounds"):
        Banded(rounds, bands)


def test_no_rounds_and_no_separation_are_refused():
    for rounds, separation in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="min_separation >= 1"):
            best_bands(rounds, separation)


def test_drawn_noise_is_given_whole_and_nothing_else():
    drawn = Drawn(torch.ones(3))
    assert torch.equal(drawn.gaussian(3), torch.ones(3))
    with pytest.raises(ValueError, match="3 values"):
        drawn.gaussian(4)
    with pytest.raises(NotImplementedError):
        drawn.uniform(3)
