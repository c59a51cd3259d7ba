r"""Bounds from canaries that were all in one release, or out, by a fair coin each.

Of m canaries the r most telling scores are guessed at: the highest half of them "in",
the lowest half "out". v guesses are right. Each canary's coin must be independent of
all others and of the data; about half of them are in. How many guesses are made is
fixed before the coins are looked at; without a number, they are all m, half of them, a
quarter, ..., and K numbers take ``alpha / K`` each.

**Any mechanism** of (epsilon, delta), with ``p = e^epsilon / (1 + e^epsilon)`` and
``b = Pr[Binomial(r, p) >= v]``, gets v guesses right with a probability of at most

    b + 2 m delta max over 1 <= i <= v of (Pr[Binomial(r, p) >= v - i] - b) / i

(Steinke et al. 2023, theorem 5.2). **A Gaussian one** is refuted at mu if a recursion
from ``i = v - 1`` down to 0 ends at a sum above ``r / m``: see :func:`_excess`.

Source:
    Steinke, Nasr & Jagielski (2023), https://arxiv.org/abs/2305.08846; Mahloujifar,
    Melis & Chaudhuri (2024), algorithm 3, https://arxiv.org/abs/2410.22235.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from fedpeft.audit.bounds.gaussian import gaussian_epsilon
from fedpeft.audit.bounds.lower_bound import LowerBound, Scores, check_delta
from fedpeft.audit.intervals import check_alpha, finite
from fedpeft.privacy import TradeOff

_FEWEST_GUESSES = 8


def one_run_bound(
    scores: Scores,
    included: Sequence[bool] | npt.NDArray[np.bool_],
    *,
    delta: float,
    alpha: float = 0.05,
    guesses: int | None = None,
) -> LowerBound:
    """Returns a bound for whatever mechanism made the release.

    **Guarantees**: above the true epsilon with a probability of at most `alpha`.

    Args:
        scores: of all canaries, shape ``(m,)``; larger means "in".
        included: whether each was in, shape ``(m,)``.
        delta: in [0, 1).
        alpha: in (0, 1).
        guesses: how many of the m; fixed beforehand. None for several numbers.

    >>> bound = one_run_bound(
    ...     [1.0] * 100 + [0.0] * 100, [True] * 100 + [False] * 100,
    ...     delta=0.0, guesses=200,
    ... )
    >>> round(bound.epsilon, 2), round(bound.ceiling, 2)
    (4.19, 4.19)
    """
    check_delta(delta, zero_is_allowed=True)

    def largest(right: int, made: int, canaries: int, share: float) -> float:
        return _root(
            lambda value: share - _p_value(right, made, canaries, value, delta)
        )

    return _bound("one-run", "", largest, scores, included, alpha, guesses)


def one_run_f_dp_bound(
    scores: Scores,
    included: Sequence[bool] | npt.NDArray[np.bool_],
    *,
    delta: float,
    alpha: float = 0.05,
    guesses: int | None = None,
) -> LowerBound:
    """Returns a bound for Gaussian noise on a sum that all contribute to.

    **Guarantees**: above the true epsilon with a probability of at most `alpha`, if the
    mechanism's trade-off function is a Gaussian one.

    Args:
        scores: of all canaries, shape ``(m,)``; larger means "in".
        included: whether each was in, shape ``(m,)``.
        delta: in (0, 1).
        alpha: in (0, 1).
        guesses: how many of the m; fixed beforehand. None for several numbers.
    """
    check_delta(delta, zero_is_allowed=False)

    def largest(right: int, made: int, canaries: int, share: float) -> float:
        mu = _root(
            lambda value: _excess(
                right, made, canaries, _gaussian_inverse(value), share
            )
        )
        return gaussian_epsilon(mu, delta)

    assumption = "Gaussian noise on a sum without sampling"
    return _bound("one-run-f-dp", assumption, largest, scores, included, alpha, guesses)


def one_run_consistent_with_claim(
    scores: Scores,
    included: Sequence[bool] | npt.NDArray[np.bool_],
    *,
    claim: TradeOff,
    alpha: float,
    guesses: int | None = None,
) -> bool:
    """Returns whether one release still allows the claimed trade-off function.

    What :func:`~fedpeft.audit.bounds.consistent_with_claim` is for canaries that each
    had a release of their own.

    **Guarantees**: if the claim is true, False has a probability of at most `alpha`,
    whatever the mechanism. True proves nothing.

    Args:
        scores: of all canaries, shape ``(m,)``; larger means "in".
        included: whether each was in, shape ``(m,)``.
        claim: of the release, such as ``trade_off(composition)``.
        alpha: in (0, 1).
        guesses: how many of the m; fixed beforehand. None for several numbers.

    >>> from fedpeft.privacy import gaussian_trade_off
    >>> coins = [True] * 100 + [False] * 100
    >>> one_run_consistent_with_claim(
    ...     coins, coins, claim=gaussian_trade_off(1.0), alpha=1e-3
    ... )
    False
    """

    def excess(right: int, made: int, canaries: int, share: float) -> float:
        return _excess(right, made, canaries, lambda x: claim(1 - x), share)

    tested = _bound("", "", excess, scores, included, alpha, guesses)
    return tested.epsilon <= 0


def _p_value(
    right: int, made: int, canaries: int, epsilon: float, delta: float
) -> float:
    """The largest probability of so many right guesses, by the formula above."""
    accuracy = float(special.expit(epsilon))
    tail = float(stats.binom.sf(right - 1, made, accuracy))
    fewer = np.arange(1, right + 1)
    gains = (stats.binom.sf(right - fewer - 1, made, accuracy) - tail) / fewer
    return tail + 2 * canaries * delta * float(gains.max(initial=0.0))


def _excess(
    right: int, made: int, canaries: int, inverse: TradeOff, alpha: float
) -> float:
    """Above 0 where a mechanism with this curve is refuted.

    If so many right guesses had a probability of alpha, then the recursion bounds from
    below how often guesses are right and wrong; their sum cannot exceed ``made / m``.

    Args:
        right: guesses that are right.
        made: guesses.
        canaries: m.
        inverse: of ``1 - f``, for the trade-off function f that is tested; since f is
            its own inverse, that is ``f(1 - x)``.
        alpha: in (0, 1).
    """
    right_share = alpha * right / canaries
    wrong_share = alpha * (made - right) / canaries
    for index in range(right - 1, -1, -1):
        forced = inverse(right_share)
        if forced <= wrong_share:
            break  # from here on neither changes
        right_share += index / (made - index) * (forced - wrong_share)
        right_share, wrong_share = min(right_share, 1.0), forced
    return right_share + wrong_share - made / canaries


def _gaussian_inverse(mu: float) -> TradeOff:
    return lambda share: float(special.ndtr(special.ndtri(share) - mu))


def _root(refuted: Callable[[float], float]) -> float:
    """Returns where a falling function crosses 0; 0.0 if it starts below."""
    if refuted(0.0) <= 0:
        return 0.0
    high = 1.0
    while refuted(high) > 0:
        high *= 2
    root: float = optimize.brentq(refuted, 0.0, high, xtol=1e-9, rtol=1e-12)
    return root


def _bound(
    name: str,
    assumption: str,
    largest: Callable[[int, int, int, float], float],
    scores: Scores,
    included: Sequence[bool] | npt.NDArray[np.bool_],
    alpha: float,
    guesses: int | None,
) -> LowerBound:
    """Makes a bound of the guesses that are right."""
    check_alpha(alpha)
    values = finite(scores, "scores")
    coins = np.asarray(included, dtype=np.bool_)
    if coins.shape != values.shape:
        raise ValueError(
            f"Expected one coin a score, got {values.size} scores and coins of shape "
            f"{coins.shape}."
        )
    numbers = _numbers(values.size, guesses)
    share = alpha / len(numbers)
    right = [_right(values, coins, made) for made in numbers]
    return LowerBound(
        name,
        max(
            largest(good, made, values.size, share)
            for good, made in zip(right, numbers, strict=True)
        ),
        alpha,
        max(largest(made, made, values.size, share) for made in numbers),
        assumption,
        values.size,
    )


def _numbers(canaries: int, guesses: int | None) -> list[int]:
    """Returns how many guesses are made, in each of the attempts."""
    if guesses is not None:
        if not 1 <= guesses <= canaries:
            raise ValueError(
                f"Expected 1 <= guesses <= {canaries} canaries, got {guesses}."
            )
        return [guesses]
    numbers = [canaries]
    while numbers[-1] // 2 >= _FEWEST_GUESSES:
        numbers.append(numbers[-1] // 2)
    return numbers


def _right(
    scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], made: int
) -> int:
    """Counts the right guesses; among equal scores, the wrong ones are made first."""
    guessed_out, guessed_in = made // 2, made - made // 2
    highest_first = included[np.lexsort((included, -scores))]
    lowest_first = included[np.lexsort((~included, scores))]
    right_in = int(highest_first[:guessed_in].sum())
    return right_in + int((~lowest_first[:guessed_out]).sum())
