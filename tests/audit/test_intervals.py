"""Intervals: exact ones by their definition, the bootstrap by its coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from fedpeft.audit.intervals import (
    bootstrap_mean,
    clopper_pearson,
    upper_limit,
)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (7, 99)])
@pytest.mark.parametrize("alpha", [0.05, 1e-3])
def test_clopper_pearson_leaves_half_of_alpha_on_each_side(successes, trials, alpha):
    low, high = clopper_pearson(successes, trials, alpha)
    if successes > 0:
        at_least = stats.binom.sf(successes - 1, trials, low)
        assert at_least == pytest.approx(alpha / 2)
    if successes < trials:
        assert stats.binom.cdf(successes, trials, high) == pytest.approx(alpha / 2)
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == trials)


def test_the_exact_interval_equals_that_of_scipy():
    exact = stats.binomtest(13, 40).proportion_ci(0.95, "exact")
    assert clopper_pearson(13, 40) == pytest.approx((exact.low, exact.high))


def test_upper_limit_without_a_success_is_a_root_of_alpha():
    assert upper_limit(0, 2, alpha=0.04) == pytest.approx(1 - 0.2)


def test_bootstrap_of_normal_values_is_near_student():
    values = np.random.default_rng(0).normal(size=200)
    low, high = bootstrap_mean(values, seed=1)
    student = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(student, abs=0.02)


def test_bootstrap_is_the_same_with_the_same_seed():
    values = np.random.default_rng(0).exponential(size=40)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def _beta(rng, victims):
    return rng.beta(0.5, 5, victims)


def _coins(rng, victims):
    return rng.binomial(1, 0.05, victims).astype(float)


def _one_in_ten(rng, victims):
    hit = rng.random(victims) < 0.1
    return rng.binomial(20, np.where(hit, 0.8, 0.02)) / 20


def _decibels(rng, victims):
    return rng.normal(3, 5, victims)


@pytest.mark.parametrize("victims", [2, 3, 5, 8, 20, 50])
@pytest.mark.parametrize(
    ("draw", "mean", "bounds"),
    [
        (_beta, 0.5 / 5.5, {"least": 0.0, "largest": 1.0}),
        (_coins, 0.05, {"least": 0.0, "largest": 1.0}),
        (_one_in_ten, 0.1 * 0.8 + 0.9 * 0.02, {"least": 0.0, "largest": 1.0}),
        (_decibels, 3.0, {}),
    ],
)
def test_the_interval_covers_the_mean_of_few_victims(draw, mean, bounds, victims):
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = bootstrap_mean(draw(rng, victims), seed=seed, **bounds)
        covered += low <= mean <= high
    # More rarely than once in a thousand for an interval that covers 93 %.
    assert covered >= stats.binom.ppf(1e-3, 100, 0.93)


def test_one_victim_a_little_apart_does_not_end_the_doubt_about_the_unseen():
    bounds = {"least": -1.0, "largest": 1.0}
    equal = bootstrap_mean([0.0] * 50, seed=0, **bounds)
    for apart in (1, 2, 10):
        values = [0.0] * (50 - apart) + [0.002] * apart
        near = bootstrap_mean(values, seed=0, **bounds)
        assert near == pytest.approx(equal, abs=0.001)


def test_values_equal_but_for_rounding_are_equal():
    values = [0.3] * 9 + [0.1 + 0.2]
    assert bootstrap_mean(values, seed=0) == (-math.inf, math.inf)


@pytest.mark.parametrize("values", [[0, 1], [1, 1, 2], [0] * 49 + [1]])
def test_bootstrap_takes_few_values_without_a_warning(values):
    low, high = bootstrap_mean(values, seed=0)
    assert -math.inf < low < np.mean(values) < high < math.inf


def test_an_interval_stays_within_the_range():
    # Student's alone is 0.5 give or take 5.
    assert bootstrap_mean([0.1, 0.9], seed=0, least=0.0, largest=1.0) == (0.0, 1.0)


def test_equal_values_say_how_many_others_there_may_be():
    low, high = bootstrap_mean([0.5] * 10, seed=0, least=0.0, largest=1.0)
    unseen = 1 - 0.025**0.1
    assert (low, high) == pytest.approx((0.5 - unseen / 2, 0.5 + unseen / 2))


def test_equal_values_without_a_range_say_nothing():
    assert bootstrap_mean([30.0] * 10, seed=0) == (-math.inf, math.inf)


def test_a_single_value_leaves_nearly_the_whole_range():
    low, high = bootstrap_mean([1.0], seed=0, least=0.0, largest=1.0)
    assert low == pytest.approx(0.025)
    assert high == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: clopper_pearson(3, 2),
            "Expected 0 <= successes <= trials and trials ",
        ),
        (lambda: clopper_pearson(0, 0), "trials >= 1, got 0 of 0"),
        (lambda: clopper_pearson(1, 2, alpha=0.0), "Expected 0 < alpha < 1, got 0.0"),
        (lambda: bootstrap_mean([], seed=0), "with n >= 1, got (0,): without values"),
        (lambda: bootstrap_mean([1.0, math.nan], seed=0), "infinity in 1 of 2: find"),
        (
            lambda: bootstrap_mean([1.2, 1.0], seed=0, largest=1.0),
            "Expected values between -inf and 1, got 1 to 1.2",
        ),
    ],
)
def test_impossible_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match="Expected") as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
