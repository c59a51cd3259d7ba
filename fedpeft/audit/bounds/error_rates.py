"""Error rates of guessing "in" of every score from a threshold on, with exact limits.

Canaries are in or out, each in an experiment of its own. Of those out, some are guessed
in (false positives); of those in, some are guessed out (false negatives). Both rates
get their Clopper-Pearson upper limit at half of alpha.

A threshold must be fixed before the scores are seen. Without one, the thresholds are
those that let 0, 1, 2, 4, ... of the canaries that are out pass, or hold back as many,
and K thresholds take ``alpha / K`` each. At such ranks the limits of the false positive
rate hold as they stand, by the order statistics of any distribution; those of the false
negative rate do because the canaries that are in are independent of the thresholds.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from fedpeft.audit.bounds.lower_bound import Array, LowerBound, Scores
from fedpeft.audit.intervals import check_alpha, finite, upper_limit
from fedpeft.privacy import TradeOff

Limits: TypeAlias = list[tuple[float, float]]
"""Of each threshold: upper limits of the false positive and false negative rates."""


def consistent_with_claim(
    false_positives: int,
    num_out: int,
    false_negatives: int,
    num_in: int,
    *,
    claim: TradeOff,
    alpha: float,
) -> bool:
    """Returns whether what was counted still allows the claimed trade-off function.

    The one test on which "DP claim falsified" rests.

    **Guarantees**: if the claim is true and the threshold was fixed before the scores
    were seen, False has a probability of at most `alpha`. Over several tests (clients,
    rounds, trials) the caller divides alpha by their number. True proves nothing.

    Args:
        false_positives: canaries that are out and were guessed in.
        num_out: canaries that are out.
        false_negatives: canaries that are in and were guessed out.
        num_in: canaries that are in.
        claim: of the plan, such as ``trade_off(composition)``.
        alpha: in (0, 1).

    >>> from fedpeft.privacy import Composition, trade_off
    >>> claim = trade_off(Composition(noise_multiplier=1.0, sampling_rate=1.0, steps=1))
    >>> consistent_with_claim(31, 100, 31, 100, claim=claim, alpha=1e-3)
    True
    >>> consistent_with_claim(5, 100, 5, 100, claim=claim, alpha=1e-3)
    False
    """
    false_positive_rate = upper_limit(false_positives, num_out, alpha / 2)
    false_negative_rate = upper_limit(false_negatives, num_in, alpha / 2)
    return claim(false_positive_rate) <= false_negative_rate


def count_errors(
    in_scores: Scores, out_scores: Scores, threshold: float
) -> tuple[int, int]:
    """Returns the false positives and the false negatives of a threshold.

    A score equal to the threshold is guessed in.

    >>> count_errors([1.0, 3.0], [0.0, 2.0], threshold=2.0)
    (1, 1)
    """
    if not math.isfinite(threshold):
        raise ValueError(f"Expected a finite threshold, got {threshold}.")
    inside, outside = finite(in_scores, "in_scores"), finite(out_scores, "out_scores")
    return int((outside >= threshold).sum()), int((inside < threshold).sum())


def bound_by_errors(
    name: str,
    assumption: str,
    epsilon_of: Callable[[Limits], float],
    in_scores: Scores,
    out_scores: Scores,
    alpha: float,
    threshold: float | None,
) -> LowerBound:
    """Makes a bound of what the limits of both error rates amount to.

    Args:
        name: of the bound.
        assumption: of the bound.
        epsilon_of: the largest epsilon that the limits prove.
        in_scores: of canaries that are in.
        out_scores: of canaries that are out.
        alpha: for all thresholds together.
        threshold: fixed before the scores were seen; None for fixed ranks.
    """
    check_alpha(alpha)
    inside, outside = finite(in_scores, "in_scores"), finite(out_scores, "out_scores")
    if threshold is None:
        errors = _errors_at_ranks(inside, outside)
        perfect = [(passed, 0) for passed, _ in errors]
    else:
        errors = [count_errors(inside, outside, threshold)]
        perfect = [(0, 0)]

    def limits(counts: list[tuple[int, int]]) -> Limits:
        share = alpha / (2 * len(counts))
        return [
            (upper_limit(fp, outside.size, share), upper_limit(fn, inside.size, share))
            for fp, fn in counts
        ]

    return LowerBound(
        name,
        epsilon_of(limits(errors)),
        alpha,
        epsilon_of(limits(perfect)),
        assumption,
        inside.size + outside.size,
    )


def _errors_at_ranks(inside: Array, outside: Array) -> list[tuple[int, int]]:
    """Returns the errors if so many of those out pass: 0, 1, 2, 4, ... and mirrored.

    Guessed in is what lies strictly above the next score of those out; with ties fewer
    of these pass than the rank says, and the rank remains the valid count.
    """
    doubling = [0, *(2**power for power in range(outside.size.bit_length() - 1))]
    ranks = sorted({*doubling, *(outside.size - 1 - rank for rank in doubling)})
    highest_first = np.sort(outside)[::-1]
    return [(rank, int((inside <= highest_first[rank]).sum())) for rank in ranks]
