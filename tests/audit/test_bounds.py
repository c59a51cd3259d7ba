"""Bounds: how far they reach, how often they exceed the truth, and what they refuse."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import integrate, stats

from fedpeft.audit.bounds import (
    clopper_pearson_bound,
    consistent_with_claim,
    count_errors,
    gaussian_fit_estimate,
    gdp_bound,
    one_run_bound,
    one_run_f_dp_bound,
    one_shot_cosine_estimate,
    pld_bound,
)
from fedpeft.audit.bounds.gaussian import fitted_epsilon, gaussian_epsilon
from fedpeft.privacy import Composition, epsilon, gaussian_trade_off, trade_off

DELTA, ALPHA, SETS = 1e-5, 0.05, 200
PLAN = Composition(noise_multiplier=1.0, sampling_rate=0.3, steps=5)


def gaussian_sets(distance, canaries=100):
    """Scores of one Gaussian release each: 200 sets, half in, half out."""
    rng = np.random.default_rng(0)
    for _ in range(SETS):
        yield rng.normal(distance, 1, canaries), rng.normal(0, 1, canaries)


def sampled_sets(plan, canaries=200):
    """Log likelihood ratios of what the plan releases: the best scores there are."""
    rng, noise, rate = (
        np.random.default_rng(0),
        plan.noise_multiplier,
        plan.sampling_rate,
    )

    def ratios(taking_part):
        drawn = rng.random((canaries, plan.steps)) < rate * taking_part
        released = drawn + noise * rng.normal(size=drawn.shape)
        odds = np.exp((released - 0.5) / noise**2)
        return np.log1p(rate * (odds - 1)).sum(axis=1)

    for _ in range(SETS):
        yield ratios(1), ratios(0)


def one_release_sets(distance, canaries=100):
    """All canaries in one release, each in by its own coin: 200 sets."""
    rng = np.random.default_rng(0)
    for _ in range(SETS):
        included = rng.random(canaries) < 0.5
        yield rng.normal(distance * included, 1), included


def exceeding(bound, sets, truth, **settings):
    """How many of the sets give a bound above the true epsilon."""
    return sum(
        bound(*scores, delta=DELTA, alpha=ALPHA, **settings).epsilon > truth
        for scores in sets
    )


COVERAGE = [
    (clopper_pearson_bound, gaussian_sets, {"threshold": 0.5}),
    (clopper_pearson_bound, gaussian_sets, {}),
    (gdp_bound, gaussian_sets, {"threshold": 0.5}),
    (gdp_bound, gaussian_sets, {}),
    (one_run_bound, one_release_sets, {"guesses": 50}),
    (one_run_bound, one_release_sets, {}),
    (one_run_f_dp_bound, one_release_sets, {"guesses": 50}),
]


@pytest.mark.parametrize(("bound", "sets", "settings"), COVERAGE)
def test_bounds_exceed_the_truth_no_more_often_than_alpha(bound, sets, settings):
    count = exceeding(bound, sets(1.0), gaussian_epsilon(1.0, DELTA), **settings)
    assert stats.binomtest(count, SETS, ALPHA, "greater").pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.5, None])
def test_the_bound_of_the_plan_exceeds_the_truth_no_more_often(threshold):
    truth, sets = epsilon([PLAN], DELTA), sampled_sets(PLAN)
    count = exceeding(pld_bound, sets, truth, plan=PLAN, threshold=threshold)
    assert stats.binomtest(count, SETS, ALPHA, "greater").pvalue > 1e-3


@pytest.mark.parametrize(
    ("bound", "settings"), [(gdp_bound, {}), (gdp_bound, {"threshold": 0.5})]
)
def test_bounds_do_exceed_an_epsilon_that_is_far_too_small(bound, settings):
    claimed = gaussian_epsilon(1.0, DELTA)
    assert exceeding(bound, gaussian_sets(3.0), claimed, **settings) == SETS


def test_bounds_for_gaussian_noise_are_above_those_for_any_mechanism():
    for in_scores, out_scores in list(gaussian_sets(1.5))[:20]:
        general = clopper_pearson_bound(
            in_scores, out_scores, delta=DELTA, threshold=1.0
        )
        gaussian = gdp_bound(in_scores, out_scores, delta=DELTA, threshold=1.0)
        assert 0 < general.epsilon < gaussian.epsilon
    for scores, included in list(one_release_sets(2.0))[:5]:
        general = one_run_bound(scores, included, delta=DELTA, guesses=40)
        gaussian = one_run_f_dp_bound(scores, included, delta=DELTA, guesses=40)
        assert 0 < general.epsilon < gaussian.epsilon


@pytest.mark.parametrize("threshold", [0.5, None])
@pytest.mark.parametrize("seed", range(5))
def test_2000_canaries_reach_most_of_an_epsilon_of_4_4(threshold, seed):
    rng, truth = np.random.default_rng(seed), gaussian_epsilon(1.0, DELTA)
    in_scores, out_scores = rng.normal(1, 1, 1000), rng.normal(0, 1, 1000)
    bound = gdp_bound(in_scores, out_scores, delta=DELTA, threshold=threshold)
    assert bound.n == 2000
    assert 4.37 < truth < 4.38
    assert 0.6 * truth <= bound.epsilon <= truth


def test_the_bound_of_the_plan_reaches_half_of_its_epsilon():
    truth = epsilon([PLAN], DELTA)
    scores = next(sampled_sets(PLAN, canaries=1000))
    bound = pld_bound(*scores, plan=PLAN, delta=DELTA)
    assert 0.5 * truth < bound.epsilon < truth


def test_the_bound_of_a_plan_without_sampling_is_the_gaussian_one_rounded_down():
    plan = Composition(noise_multiplier=9.0, sampling_rate=1.0, steps=16)
    scores = next(gaussian_sets(2.0))
    planned = pld_bound(*scores, plan=plan, delta=DELTA, threshold=1.0)
    closed = gdp_bound(*scores, delta=DELTA, threshold=1.0)
    assert 0.97 * closed.epsilon < planned.epsilon <= 1.001 * closed.epsilon
    assert 0.97 * closed.ceiling < planned.ceiling <= 1.001 * closed.ceiling


def test_scores_that_no_noise_explains_have_no_epsilon():
    """Who is drawn in one of ten steps cannot be seen in every one of 500."""
    plan = Composition(noise_multiplier=1.0, sampling_rate=0.1, steps=1)
    bound = pld_bound([1.0] * 500, [0.0] * 500, plan=plan, delta=DELTA, threshold=0.5)
    assert bound.epsilon == bound.ceiling == math.inf


@pytest.mark.parametrize(
    ("canaries", "ceiling"),
    [(50, 2.6), (200, 4.0), (500, 4.9), (1000, 5.6), (10_000, 7.9)],
)
def test_ceiling_of_a_threshold_grows_with_the_canaries(canaries, ceiling):
    perfect = clopper_pearson_bound(
        [1.0] * canaries, [0.0] * canaries, delta=0.0, threshold=0.5
    )
    assert round(perfect.ceiling, 1) == ceiling
    assert perfect.epsilon == perfect.ceiling


@pytest.mark.parametrize(("canaries", "ceiling"), [(200, 4.2), (500, 5.1), (1000, 5.8)])
def test_ceiling_of_one_run_grows_with_the_guesses(canaries, ceiling):
    included = np.arange(canaries) % 2 == 0
    perfect = one_run_bound(1.0 * included, included, delta=0.0, guesses=canaries)
    assert round(perfect.ceiling, 1) == ceiling
    assert perfect.epsilon == perfect.ceiling


@pytest.mark.parametrize("bound", [clopper_pearson_bound, gdp_bound])
def test_perfect_separation_reaches_the_ceiling_at_ranks_too(bound):
    perfect = bound(np.arange(100) + 100.0, np.arange(100.0), delta=DELTA)
    assert perfect.epsilon == perfect.ceiling


@pytest.mark.parametrize("bound", [one_run_bound, one_run_f_dp_bound])
def test_perfect_guesses_reach_the_ceiling(bound):
    perfect = bound([1.0] * 32 + [0.0] * 32, [True] * 32 + [False] * 32, delta=DELTA)
    assert perfect.epsilon == perfect.ceiling


@pytest.mark.parametrize("bound", [clopper_pearson_bound, gdp_bound])
def test_equal_scores_and_swapped_worlds_say_nothing(bound):
    assert bound([1.0] * 100, [1.0] * 100, delta=DELTA).epsilon == 0.0
    assert bound([0.0] * 100, [1.0] * 100, delta=DELTA).epsilon == 0.0


@pytest.mark.parametrize("bound", [one_run_bound, one_run_f_dp_bound])
def test_equal_scores_are_guessed_wrong_in_whatever_order_they_come(bound):
    included = np.arange(64) < 32
    for order in (included, ~included):
        assert bound([1.0] * 64, order, delta=DELTA).epsilon == 0.0


def test_ties_of_those_out_never_help():
    tied = clopper_pearson_bound([1.0] * 100, [0.0] * 90 + [1.0] * 10, delta=DELTA)
    apart = clopper_pearson_bound([1.0] * 100, [0.0] * 90 + [0.5] * 10, delta=DELTA)
    assert tied.epsilon < apart.epsilon


def test_a_smaller_alpha_proves_less():
    scores = next(gaussian_sets(2.0))
    bounds = [gdp_bound(*scores, delta=DELTA, alpha=a).epsilon for a in (0.1, 1e-3)]
    assert bounds[0] > bounds[1] > 0


def test_a_score_at_the_threshold_is_guessed_in():
    assert count_errors([1.0, 2.0, 3.0], [0.0, 2.0], threshold=2.0) == (1, 1)


@pytest.mark.parametrize("alpha", [0.05, 1e-3])
def test_a_true_claim_is_refuted_no_more_often_than_alpha(alpha):
    """By the numbers: the probability of every outcome that refutes, added up."""
    canaries, error = 40, stats.norm.cdf(-0.5)
    chance = stats.binom.pmf(np.arange(canaries + 1), canaries, error)
    claim = gaussian_trade_off(1.0)
    refuting = sum(
        chance[fp] * chance[fn]
        for fp, fn in product(range(canaries + 1), repeat=2)
        if not consistent_with_claim(
            fp, canaries, fn, canaries, claim=claim, alpha=alpha
        )
    )
    assert 0 < refuting <= alpha


def test_a_claim_of_twice_the_noise_is_refuted():
    claim = trade_off(Composition(noise_multiplier=2.0, sampling_rate=1.0, steps=1))
    errors = count_errors(*next(gaussian_sets(1.0, canaries=1000)), threshold=0.5)
    assert not consistent_with_claim(
        errors[0], 1000, errors[1], 1000, claim=claim, alpha=1e-3
    )


def test_what_shows_nothing_refutes_nothing():
    claim = gaussian_trade_off(0.0)
    assert consistent_with_claim(50, 100, 50, 100, claim=claim, alpha=1e-3)
    assert consistent_with_claim(100, 100, 0, 100, claim=claim, alpha=1e-3)


def test_gaussian_epsilon_inverts_the_closed_form():
    value, mu = gaussian_epsilon(2.0, 1e-6), 2.0
    left, right = stats.norm.cdf([mu / 2 - value / mu, -mu / 2 - value / mu])
    assert left - math.exp(value) * right == pytest.approx(1e-6)
    assert gaussian_epsilon(1e-7, 1e-6) == 0.0


@pytest.mark.parametrize(("mu", "spread"), [(1.0, 1.3), (1.0, 0.7), (0.0, 2.0)])
def test_fitted_epsilon_is_the_worse_of_both_integrals(mu, spread):
    value = fitted_epsilon(mu, spread, 0.01)
    seen, unseen = stats.norm(mu, spread).pdf, stats.norm(0, 1).pdf

    def divergence(first, second):
        def excess(x):
            return max(0.0, first(x) - math.exp(value) * second(x))

        points = np.linspace(-8, 8, 65)
        return integrate.quad(excess, -20, 20, points=points, limit=500)[0]

    worse = max(divergence(seen, unseen), divergence(unseen, seen))
    assert worse == pytest.approx(0.01, rel=1e-5)


def test_estimates_find_the_epsilon_of_many_canaries_and_say_what_they_are():
    rng, truth = np.random.default_rng(0), gaussian_epsilon(1.0, DELTA)
    fit = gaussian_fit_estimate(
        rng.normal(1, 1, 100_000), rng.normal(0, 1, 100_000), delta=DELTA
    )
    cosines = rng.normal(1, 1, 100_000) / 100
    one_shot = one_shot_cosine_estimate(cosines, 10_000, delta=DELTA)
    for estimate in (fit, one_shot):
        assert estimate.is_estimate
        assert estimate.ceiling == math.inf
        assert estimate.epsilon == pytest.approx(truth, rel=0.05)


def test_estimates_of_scores_without_spread_are_endless_or_nothing():
    assert gaussian_fit_estimate([1.0] * 9, [0.0] * 9, delta=DELTA).epsilon == math.inf
    assert gaussian_fit_estimate([1.0] * 9, [1.0] * 9, delta=DELTA).epsilon == 0.0
    assert one_shot_cosine_estimate([0.5] * 9, 100, delta=DELTA).epsilon == math.inf


GOOD = [0.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gdp_bound([], GOOD, delta=DELTA),
            "Expected in_scores of shape (n,) with n >= 1, got (0,)",
        ),
        (
            lambda: clopper_pearson_bound(GOOD, [math.nan, 1.0], delta=DELTA),
            "Expected finite out_scores, got NaN or infinity in 1 of 2",
        ),
        (
            lambda: clopper_pearson_bound(GOOD, GOOD, delta=1.0),
            "Expected 0 <= delta < 1, got 1.0",
        ),
        (
            lambda: one_run_bound(GOOD, [True, False], delta=math.nan),
            "Expected 0 <= delta < 1, got nan",
        ),
        (
            lambda: gdp_bound(GOOD, GOOD, delta=0.0),
            "no Gaussian noise has a finite epsilon at delta 0",
        ),
        (
            lambda: pld_bound(GOOD, GOOD, plan=PLAN, delta=DELTA, alpha=1.0),
            "Expected 0 < alpha < 1, got 1.0",
        ),
        (
            lambda: gdp_bound(GOOD, GOOD, delta=DELTA, threshold=math.nan),
            "Expected a finite threshold, got nan",
        ),
        (
            lambda: one_run_bound(GOOD, [True], delta=DELTA),
            "Expected one coin a score, got 2 scores and coins of shape (1,)",
        ),
        (
            lambda: one_run_f_dp_bound(GOOD, [True, False], delta=DELTA, guesses=3),
            "Expected 1 <= guesses <= 2 canaries, got 3",
        ),
        (
            lambda: gaussian_fit_estimate([1.0], GOOD, delta=DELTA),
            "Expected at least 2 in_scores to fit a spread, got 1",
        ),
        (
            lambda: one_shot_cosine_estimate([1.0, 2.0], 10, delta=DELTA),
            "Expected cosines in [-1, 1] and a dimension >= 1, got up to 2 and 10",
        ),
        (
            lambda: consistent_with_claim(
                5, 4, 0, 4, claim=gaussian_trade_off(1.0), alpha=0.05
            ),
            "Expected 0 <= successes <= trials and trials >= 1, got 5 of 4",
        ),
    ],
)
def test_impossible_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match="Expected") as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
