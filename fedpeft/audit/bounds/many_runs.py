"""Bounds from canaries that each had an experiment of its own.

With upper limits of the false positive rate (FPR) and the false negative rate (FNR):

* any mechanism of (epsilon, delta) has ``epsilon >= log((1 - delta - FNR) / FPR)``, and
  the same with both rates exchanged;
* a Gaussian one has ``mu >= Phi^-1(1 - FPR) - Phi^-1(FNR)``;
* a subsampled one has a trade-off function f with ``f(FPR) <= FNR``, which falls as its
  noise does.

Source:
    Jagielski, Ullman & Oprea (2020), https://arxiv.org/abs/2006.07709; Nasr et al.
    (2023), "Tight auditing of differentially private machine learning", section 4,
    https://arxiv.org/abs/2302.07956.
"""

import math
from dataclasses import replace

from scipy import special

from fedpeft.audit.bounds.error_rates import Limits, bound_by_errors
from fedpeft.audit.bounds.gaussian import gaussian_epsilon
from fedpeft.audit.bounds.lower_bound import LowerBound, Scores, check_delta
from fedpeft.privacy import Composition, epsilon, trade_off

# The noise multipliers that the search for the plan's bound knows: 1/32 to 1,024, each
# 1.1 % above the one before it.
_NOISES = [2 ** (step / 64) for step in range(-5 * 64, 10 * 64 + 1)]


def clopper_pearson_bound(
    in_scores: Scores,
    out_scores: Scores,
    *,
    delta: float,
    alpha: float = 0.05,
    threshold: float | None = None,
) -> LowerBound:
    """Returns a bound for whatever mechanism made the scores.

    **Guarantees**: above the true epsilon with a probability of at most `alpha`.

    Args:
        in_scores: of canaries that are in, one experiment each; larger means "in".
        out_scores: of canaries that are out.
        delta: in [0, 1).
        alpha: in (0, 1).
        threshold: fixed before the scores were seen; None for fixed ranks.

    >>> bound = clopper_pearson_bound([1.0] * 50, [0.0] * 50, delta=0.0, threshold=0.5)
    >>> round(bound.epsilon, 2), round(bound.ceiling, 2)
    (2.57, 2.57)
    """
    check_delta(delta, zero_is_allowed=True)

    def largest(limits: Limits) -> float:
        return max(max(_log_ratio(a, b), _log_ratio(b, a)) for a, b in limits)

    def _log_ratio(rate: float, other: float) -> float:
        return max(0.0, math.log(max(1 - delta - other, rate) / rate))

    return bound_by_errors(
        "clopper-pearson", "", largest, in_scores, out_scores, alpha, threshold
    )


def gdp_bound(
    in_scores: Scores,
    out_scores: Scores,
    *,
    delta: float,
    alpha: float = 0.05,
    threshold: float | None = None,
) -> LowerBound:
    """Returns a bound for Gaussian noise on a sum that all contribute to.

    **Guarantees**: above the true epsilon with a probability of at most `alpha`, if the
    mechanism's trade-off function is a Gaussian one; for sampled batches it is not, and
    :func:`pld_bound` is there.

    Args:
        in_scores: of canaries that are in, one experiment each; larger means "in".
        out_scores: of canaries that are out.
        delta: in (0, 1).
        alpha: in (0, 1).
        threshold: fixed before the scores were seen; None for fixed ranks.
    """
    check_delta(delta, zero_is_allowed=False)

    def largest(limits: Limits) -> float:
        mu = max(float(-special.ndtri(a) - special.ndtri(b)) for a, b in limits)
        return gaussian_epsilon(mu, delta)

    return bound_by_errors(
        "gdp",
        "Gaussian noise on a sum without sampling",
        largest,
        in_scores,
        out_scores,
        alpha,
        threshold,
    )


def pld_bound(
    in_scores: Scores,
    out_scores: Scores,
    *,
    plan: Composition,
    delta: float,
    alpha: float = 0.05,
    threshold: float | None = None,
) -> LowerBound:
    """Returns a bound for the plan's mechanism with a noise that nobody vouches for.

    The smallest epsilon of the plan's sampling rate and steps, at any noise multiplier,
    whose trade-off function allows the errors; rounded down by up to 1.1 % of the
    noise.

    **Guarantees**: above the accountant's epsilon of the true noise multiplier with a
    probability of at most `alpha`, if sampling and steps are the plan's. Infinite where
    no noise at all explains the scores, so that sampling or steps are not.

    Args:
        in_scores: of canaries that are in, one experiment each; larger means "in".
        out_scores: of canaries that are out.
        plan: what is claimed; its noise multiplier is not looked at.
        delta: in (0, 1).
        alpha: in (0, 1).
        threshold: fixed before the scores were seen; None for fixed ranks.
    """
    check_delta(delta, zero_is_allowed=False)

    def smallest(limits: Limits) -> float:
        return _plan_epsilon(limits, plan, delta)

    return bound_by_errors(
        "pld",
        f"Gaussian noise, {plan.sampling} sampling at rate {plan.sampling_rate:g}, "
        f"steps: {plan.steps}",
        smallest,
        in_scores,
        out_scores,
        alpha,
        threshold,
    )


def _plan_epsilon(limits: Limits, plan: Composition, delta: float) -> float:
    """Bisects the noise multipliers for the first one that the limits exclude."""
    first, end = 0, len(_NOISES)
    while first < end:
        middle = (first + end) // 2
        curve = trade_off(replace(plan, noise_multiplier=_NOISES[middle]))
        if all(curve(a) <= b for a, b in limits):
            first = middle + 1
        else:
            end = middle
    if first == 0:
        return math.inf
    if first == len(_NOISES):
        return 0.0
    return epsilon([replace(plan, noise_multiplier=_NOISES[first])], delta)
