"""From scores to a finding: one test decides, the bounds beside it are shown.

**The deciding test**, fixed beforehand: of a pair's releases, how many without the
canary are guessed "in", and how many with it "out", at the pair's own threshold? Upper
limits of both rates (Clopper-Pearson) must be allowed by the trade-off function that
the plan claims for one such release. Where all canaries are in one run, their guesses
are held against the trade-off function claimed for its rounds. Over all tests of an
audit together a correct implementation is refuted with a probability of at most
:data:`FAMILY_ALPHA`: each test takes a share of it (Bonferroni). Nothing else decides.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedpeft.audit.bounds import (
    LowerBound,
    clopper_pearson_bound,
    consistent_with_claim,
    count_errors,
    gaussian_fit_estimate,
    gdp_bound,
    one_run_bound,
    one_run_consistent_with_claim,
    one_run_f_dp_bound,
    pld_bound,
)
from fedpeft.audit.results import BoundResult, DpTrial
from fedpeft.privacy import (
    Composition,
    TradeOff,
    epsilon,
    gaussian_trade_off,
    trade_off,
)

FAMILY_ALPHA = 1e-3
"""The probability that a correct implementation is refuted in any test of an audit."""

_SHOWN_ALPHA = 0.05

Scores = npt.NDArray[np.float64]


def decide_pair(
    trial: str,
    detail: str,
    scores: tuple[Scores, Scores],
    *,
    threshold: float,
    claim: Composition,
    delta: float,
    alpha: float,
) -> DpTrial:
    """Judges releases with and without a canary, each of its own.

    Args:
        trial: its name.
        detail: what it looks for.
        scores: with the canary, and without it.
        threshold: fixed beforehand.
        claim: of one release.
        delta: at which epsilons are given.
        alpha: of this test.
    """
    inside, outside = scores
    false_positives, false_negatives = count_errors(inside, outside, threshold)
    is_consistent = consistent_with_claim(
        false_positives,
        len(outside),
        false_negatives,
        len(inside),
        claim=claimed_curve(claim),
        alpha=alpha,
    )
    bounds = _pair_bounds(scores, threshold, claim, delta, alpha)
    wrong = f"{false_positives} of {len(outside)} without the canary were taken for "
    wrong += f"with it, {false_negatives} of {len(inside)} with it for without"
    return DpTrial(
        trial,
        client=None,
        server_round=None,
        canaries=len(inside),
        epsilon_upper=epsilon([claim], delta),
        delta=delta,
        bounds=_results(bounds),
        falsified=not is_consistent,
        detail=(
            f"Looks for {detail}. One release at noise multiplier "
            f"{claim.noise_multiplier:.3f} and sampling rate {claim.sampling_rate:g}: "
            f"at the threshold fixed beforehand {wrong}."
        ),
    )


def _pair_bounds(
    scores: tuple[Scores, Scores],
    threshold: float,
    claim: Composition,
    delta: float,
    alpha: float,
) -> list[LowerBound]:
    """Returns what the deciding test amounts to as an epsilon, then what is shown."""

    def bound(level: float) -> LowerBound:
        if claim.sampling_rate == 1:
            return gdp_bound(*scores, delta=delta, alpha=level, threshold=threshold)
        return pld_bound(
            *scores, plan=claim, delta=delta, alpha=level, threshold=threshold
        )

    free = clopper_pearson_bound(
        *scores, delta=delta, alpha=_SHOWN_ALPHA, threshold=threshold
    )
    found = [bound(alpha), free]
    if claim.sampling_rate == 1 and all(np.ptp(side) > 0 for side in scores):
        fit = gaussian_fit_estimate(*scores, delta=delta, alpha=_SHOWN_ALPHA)
        found += [bound(_SHOWN_ALPHA), fit]
    return found


def decide_run(
    trial: str,
    detail: str,
    scores: Scores,
    included: npt.NDArray[np.bool_],
    *,
    client: int | None,
    server_round: int,
    claim: Composition,
    delta: float,
    alpha: float,
) -> DpTrial:
    """Judges all canaries of one client after so many rounds of one run.

    The claimed trade-off function is tested itself, with all canaries of one release.
    The first of the bounds is what the same guesses say of noise without sampling.

    Args:
        trial: its name.
        detail: what was done.
        scores: of all canaries, larger means "in".
        included: by independent fair coins.
        client: whose run; None where the canaries are the clients.
        server_round: how many of its rounds have been seen.
        claim: of these rounds.
        delta: at which epsilons are given.
        alpha: of this test.
    """
    inside, outside = scores[included], scores[~included]
    bounds = [
        one_run_f_dp_bound(scores, included, delta=delta, alpha=alpha),
        one_run_bound(scores, included, delta=delta, alpha=_SHOWN_ALPHA),
        one_run_f_dp_bound(scores, included, delta=delta, alpha=_SHOWN_ALPHA),
    ]
    if min(len(inside), len(outside)) > 1:
        fit = gaussian_fit_estimate(inside, outside, delta=delta, alpha=_SHOWN_ALPHA)
        bounds.append(fit)
    return DpTrial(
        trial,
        client,
        server_round,
        canaries=len(scores),
        epsilon_upper=epsilon([claim], delta),
        delta=delta,
        bounds=_results(bounds),
        falsified=not one_run_consistent_with_claim(
            scores, included, claim=claimed_curve(claim), alpha=alpha
        ),
        detail=detail,
    )


def claimed_curve(claim: Composition) -> TradeOff:
    """Returns the trade-off function that is claimed; in closed form if there is one.

    >>> done = Composition(noise_multiplier=2.0, sampling_rate=1.0, steps=4)
    >>> round(claimed_curve(done)(0.5), 4)
    0.1587
    """
    if claim.sampling_rate == 1 and claim.noise_multiplier:
        return gaussian_trade_off(claim.steps**0.5 / claim.noise_to_change)
    return trade_off(claim)


def _results(bounds: Sequence[LowerBound]) -> tuple[BoundResult, ...]:
    return tuple(
        BoundResult(
            bound.name,
            bound.epsilon,
            bound.ceiling,
            bound.alpha,
            bound.is_estimate,
            bound.assumption,
        )
        for bound in bounds
    )
