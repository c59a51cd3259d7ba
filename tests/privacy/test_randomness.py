"""Noise and batches: the right distribution, both ways; never the same stream twice."""

import copy
import itertools
import math
import os
import pickle
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from fedpeft.privacy.randomness import (
    Randomness,
    SecureRandomness,
    SeededRandomness,
    _gaussian_pairs,
    grid,
    noised,
    poisson_batch,
    sample,
)

# A right generator fails a test of this level once in a million runs.
LEVEL = 1e-6


@pytest.fixture(params=["secure", "seeded"])
def randomness(request):
    return SecureRandomness() if request.param == "secure" else SeededRandomness(0)


class Fixed(Randomness):
    """Returns the values it was given."""

    def __init__(self, *values):
        self.values = torch.tensor(values, dtype=torch.float64)

    def uniform(self, count):
        return self.values[:count]

    def gaussian(self, count):
        return self.values[:count]


@pytest.mark.parametrize("count", [0, 1, 7, 16384, 40001])
def test_draws_have_their_shape_and_type(randomness, count):
    for draw in (randomness.uniform(count), randomness.gaussian(count)):
        assert draw.shape == (count,)
        assert draw.dtype == torch.float64
        assert bool(torch.isfinite(draw).all())


def test_uniform_draws_are_uniform(randomness):
    draw = randomness.uniform(50_000)
    assert draw.min() >= 0
    assert draw.max() < 1
    assert stats.kstest(draw.numpy(), "uniform").pvalue > LEVEL


def test_gaussian_draws_are_gaussian_far_into_the_tail(randomness):
    draw = randomness.gaussian(1_000_000).numpy()
    assert stats.kstest(draw, "norm").pvalue > LEVEL
    for far in (3.0, 4.0):
        beyond = int((np.abs(draw) > far).sum())
        expected = 2 * stats.norm.sf(far)
        assert stats.binomtest(beyond, len(draw), expected).pvalue > LEVEL


def test_the_tail_ends_beyond_thirteen_deviations():
    nothing = np.zeros((3, 1), np.uint64)
    everything = np.full((3, 1), 2**64 - 1, np.uint64)
    assert _gaussian_pairs(nothing)[0] == pytest.approx(math.sqrt(258 * math.log(2)))
    assert _gaussian_pairs(everything)[0] == 0


@pytest.mark.parametrize(
    ("factor", "accepted"), [(1, True), (2 / 3, False), (1.5, False)]
)
def test_the_standard_deviation_is_right_and_no_other(randomness, factor, accepted):
    total = torch.linspace(-3, 3, 20_000)
    noise = noised(total, 0.7, randomness).double() - total
    test = stats.kstest(noise.numpy(), stats.norm(0, 0.7 * factor).cdf)
    assert (test.pvalue > LEVEL) == accepted


def test_coordinates_are_uncorrelated(randomness):
    draw = randomness.gaussian(200_000).numpy()
    half = len(draw) // 2
    # Neighbours, the two members of a Box-Muller pair, and chunks.
    for lag in (1, 2, 8192, 16384, half):
        first, second = draw[:-lag], draw[lag:]
        for power in (1, 2):
            measured = np.corrcoef(first**power, second**power)[0, 1]
            assert abs(measured) * math.sqrt(len(first)) < 6


def test_no_two_draws_of_a_secure_source_are_equal():
    source = SecureRandomness()
    sources = [source, source, copy.deepcopy(source), SecureRandomness()]
    sources.append(pickle.loads(pickle.dumps(source)))
    draws = torch.cat([source.gaussian(20_000) for source in sources])
    assert len(draws.unique()) == len(draws)


def test_a_forked_process_does_not_repeat_its_parent():
    source = SecureRandomness()
    source.gaussian(3)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Later Pythons warn of forking beside threads; the child uses none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.write(writing, source.gaussian(4).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reading, 32))
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 4
    assert not set(theirs) & set(source.gaussian(4).tolist())


def test_a_seed_repeats_bit_for_bit_and_another_does_not():
    def draw(seed):
        source = SeededRandomness(seed)
        return torch.cat([source.gaussian(100), source.uniform(100)])

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("deviation", [1e-6, 0.5, 1.0, 1.7, 300.0])
def test_noised_totals_lie_on_the_grid_nearest_to_the_sum(deviation):
    total = torch.linspace(-20, 20, 5000) * deviation
    released = noised(total, deviation, SeededRandomness(1)).double()
    exact = total.double() + deviation * SeededRandomness(1).gaussian(5000)
    cell = grid(deviation)

    assert deviation / 2**11 < cell <= deviation / 2**10
    assert torch.equal(released / cell, (released / cell).round())
    assert bool(((released - exact).abs() <= cell / 2).all())


def test_low_order_bits_no_longer_tell_two_totals_apart():
    small = 0.25 + 2.0**-54  # a noise that a total of 1 would have rounded off
    finest = 2.0**-53

    def tells(released):
        return bool((released.double() % finest != 0).any())

    assert tells(torch.tensor([small], dtype=torch.float64) + 0.0)
    assert not tells(torch.tensor([small], dtype=torch.float64) + 1.0)
    for total in (0.0, 1.0):
        released = noised(torch.tensor([total]), 1.0, Fixed(small))
        assert released.item() == total + 0.25


def test_noised_keeps_the_shape_and_leaves_its_input(randomness):
    total = torch.ones(3, 5)
    released = noised(total, 2.0, randomness)
    assert released.shape == (3, 5)
    assert released.dtype == torch.float32
    assert torch.equal(total, torch.ones(3, 5))
    assert not torch.equal(released, total)


def test_no_noise_changes_nothing(randomness):
    total = torch.tensor([1.0 + 2**-23, -3e-30])
    assert torch.equal(noised(total, 0.0, randomness), total)


@pytest.mark.parametrize("deviation", [-1.0, math.nan, math.inf])
def test_a_standard_deviation_out_of_range_is_refused(randomness, deviation):
    with pytest.raises(ValueError, match="standard_deviation >= 0"):
        noised(torch.zeros(2), deviation, randomness)


def test_batch_sizes_are_binomial(randomness):
    batches = [poisson_batch(200, 0.1, randomness) for _ in range(3000)]
    observed = np.bincount([len(batch) for batch in batches], minlength=201)
    # Sizes 10 to 30 one by one, the tails beside them together.
    edges = [0, *range(10, 32), 201]
    grouped = [observed[low:high].sum() for low, high in itertools.pairwise(edges)]
    below = stats.binom(200, 0.1).cdf(np.array(edges) - 1)
    assert stats.chisquare(grouped, 3000 * np.diff(below)).pvalue > LEVEL


def test_every_index_is_chosen_equally_often_and_on_its_own(randomness):
    chosen = np.zeros((4000, 20))
    for row in chosen:
        row[poisson_batch(20, 0.3, randomness)] = 1
    counts = chosen.sum(axis=0)
    assert np.abs(counts - 1200).max() < 6 * math.sqrt(4000 * 0.3 * 0.7)
    correlations = np.corrcoef(chosen.T)[np.triu_indices(20, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(4000)


def test_an_index_is_in_the_batch_where_its_uniform_is_below_the_rate():
    rate = 0.25
    last_below = rate - 2.0**-54
    assert poisson_batch(3, rate, Fixed(last_below, rate, 0.0)) == [0, 2]


def test_batches_at_the_edges(randomness):
    assert poisson_batch(5, 1.0, randomness) == [0, 1, 2, 3, 4]
    assert poisson_batch(0, 0.5, randomness) == []
    assert poisson_batch(100, 1e-12, randomness) == []


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_rate_out_of_range_is_refused(randomness, rate):
    with pytest.raises(ValueError, match="sampling_rate <= 1"):
        poisson_batch(5, rate, randomness)


def test_a_sample_is_uniform_and_never_larger_than_asked():
    source = SeededRandomness(0)
    taken = Counter()
    for _ in range(3000):
        chosen = sample([10, 20, 30], 2, source)
        assert len(chosen) == 2
        assert chosen == sorted(chosen)
        taken.update(chosen)
    # Each of three with probability 2/3: a standard deviation of 26.
    assert all(taken[index] == pytest.approx(2000, abs=130) for index in (10, 20, 30))
    assert sample([7], 2, source) == [7]
    assert sample([], 2, source) == []
