r"""Correlated noise: what one round adds, later rounds partly take back.

The server's state is the sum of all rounds so far, so what counts is the noise on the
sums of the first t rounds. Independent noise of standard deviation 1 makes it grow like
the square root of t. A matrix factorisation releases, for the rounds' clipped sums X
(one row a round, in units of the clipping norm), the rows of

    X + z C^-1 Z  =  C^-1 (C X + z Z),

with independent standard Gaussians Z, the noise multiplier z, and a lower triangular
matrix C that all know. The right-hand side is post-processing of one Gaussian
mechanism, the noised C X. Here C is banded: the first `bands` coefficients of
``(1 - x)^(-1/2)`` on its diagonals, each column divided by its own norm.

**Price.** C multiplies row j of X by its column j, which is zero outside the rows j to
``j + bands - 1`` and has norm 1. If two rounds of one client are always at least
`bands` apart, its columns have no row in common: they are orthogonal. Adding or
removing a client that takes part in k rounds, with contributions u_1, ..., u_k of norm
at most 1, then moves C X by ``sqrt(|u_1|^2 + ... + |u_k|^2) <= sqrt(k)``. That is the
sensitivity of k independent releases, so the privacy loss is exactly theirs: k releases
of noise multiplier z at sampling rate 1. It holds although the rounds' sums depend on
what was released before, since C is lower triangular and the noise Gaussian (Denisov et
al. 2022, theorem 2.1). Nothing is gained from drawing cohorts in secret.

Source:
    Choquette-Choo et al. (2023), "(Amplified) banded matrix factorization",
    https://arxiv.org/abs/2306.08153; Denisov et al. (2022),
    https://arxiv.org/abs/2202.08312; the square root as a factor: Fichtenberger,
    Henzinger & Upadhyay (2022), https://arxiv.org/abs/2202.11205; cut to a band:
    Kalinin & Lampert (2024), https://arxiv.org/abs/2405.13763.

>>> round(prefix_error(100, bands=1) / prefix_error(100, bands=100), 1)
3.1
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import linalg, signal

from fedpeft.interfaces import State
from fedpeft.privacy.randomness import Randomness

Array = npt.NDArray[np.float64]


def coefficients(bands: int) -> Array:
    """Returns the first coefficients of ``(1 - x)^(-1/2)``, shape ``(bands,)``.

    >>> coefficients(4).tolist()
    [1.0, 0.5, 0.375, 0.3125]
    """
    index = np.arange(1, bands)
    return np.cumprod(np.concatenate([[1.0], (2 * index - 1) / (2 * index)]))


def factor(rounds: int, bands: int) -> Array:
    """Returns the matrix C of the module's description, shape ``(rounds, rounds)``.

    >>> factor(2, bands=1).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    diagonals = np.zeros(rounds)
    diagonals[:bands] = coefficients(bands)[:rounds]
    matrix: Array = np.tril(linalg.toeplitz(diagonals))
    return matrix / _column_norms(rounds, bands)


def prefix_error(rounds: int, bands: int) -> float:
    """Returns the noise on the sums of the first t rounds, root mean square over all t.

    In units of ``noise_multiplier * clipping_norm``, for one coordinate. One band is
    independent noise, and the price does not depend on the bands, so the ratio of two
    such errors compares two mechanisms at the same epsilon.

    >>> prefix_error(7, bands=1)  # the root of the mean of 1, 2, ..., 7
    2.0
    """
    norms = _column_norms(rounds, bands)
    impulse = np.zeros(rounds)
    impulse[0] = 1.0
    # C is a Toeplitz matrix with scaled columns, so C^-1 has scaled rows: the inverse
    # power series, times the norms.
    inverse = signal.lfilter([1.0], coefficients(bands), impulse)
    squares = 0.0
    for first in range(rounds):
        sums = np.cumsum(norms[first:] * inverse[: rounds - first])
        squares += float(sums @ sums)
    return math.sqrt(squares / rounds)


def best_bands(rounds: int, min_separation: int) -> int:
    """Returns the number of bands with the least :func:`prefix_error`.

    Among the powers of two up to `min_separation`, and `min_separation` itself; of
    equal ones the fewest, as each costs a vector of memory.

    Args:
        rounds: of the whole run, at least 1.
        min_separation: least difference between the numbers of two rounds of one
            client: 1 if it may take part in two rounds running.

    >>> best_bands(100, min_separation=20)
    20
    """
    if rounds < 1 or min_separation < 1:
        raise ValueError(
            f"Expected rounds and min_separation >= 1, got {rounds} and "
            f"{min_separation}."
        )
    most = min(rounds, min_separation)
    powers = [1 << i for i in range(most.bit_length())]
    return min(sorted({*powers, most}), key=lambda bands: prefix_error(rounds, bands))


@dataclass(frozen=True)
class Banded:
    """Makes each round's noise out of fresh noise and that of the rounds before.

    **Guarantees**: what the rounds ``1, ..., rounds`` return is ``C^-1 Z`` row by row,
    for their fresh noise Z and ``C = factor(rounds, bands)``. Given all earlier rounds,
    a round's noise is Gaussian with a standard deviation of 1 or more around a value
    that they determine: what :func:`~fedpeft.privacy.randomness.noised` says of its
    grid, for noise of standard deviation 1, holds for every round. Each rounded release
    is a function of that round's exact one, so rounding is post-processing here too.
    The recursion is stable: its coefficients are positive and fall, so all its roots
    are inside the unit circle (Enestrom & Kakeya), and errors of rounding do not grow.

    **Not guaranteed**: that a client's rounds are at least `bands` apart. Who chooses
    cohorts must see to it; nearer ones cost more than is accounted. The state is as
    secret as the clients' updates: whoever reads it takes noise off what was released.

    Memory: ``bands - 1`` vectors in double precision, twice that during a round; every
    checkpoint holds them.

    Attributes:
        rounds: of the whole run; there is no noise for a later one.
        bands: of C, in 1 to `rounds`; at most the least separation of a client's
            rounds.
    """

    rounds: int
    bands: int

    def __post_init__(self) -> None:
        if not 1 <= self.bands <= self.rounds:
            raise ValueError(
                f"Expected 1 <= bands <= rounds, got {self.bands} bands and "
                f"{self.rounds} rounds."
            )

    def init(self, size: int) -> State:
        """Returns the history before the first round, shape ``(bands - 1, size)``."""
        return {"history": torch.zeros(self.bands - 1, size, dtype=torch.float64)}

    def correlate(
        self, fresh: torch.Tensor, server_round: int, state: State
    ) -> tuple[torch.Tensor, State]:
        """Returns the noise of a round, float64, and the next state.

        Args:
            fresh: independent standard Gaussian values, float64, shape ``(size,)``.
            server_round: from 1; each once and in order, as the history demands.
            state: what the round before returned.

        Raises:
            ValueError: for a round outside 1 to `rounds`.
        """
        if not 1 <= server_round <= self.rounds:
            raise ValueError(
                f"Expected a round of 1 to {self.rounds}, got {server_round}: the "
                "noise was planned for so many; plan a new run for more."
            )
        weights = coefficients(self.bands)
        history = state["history"]
        # What is kept, oldest first, is noise before its column's norm is put back:
        # then all rounds have the same recursion. One band after another, so that bits
        # depend on no library's order of summation.
        mixed = fresh.clone()
        for weight, past in zip(weights[:0:-1].tolist(), history, strict=True):
            mixed.sub_(past, alpha=weight)
        following = history.roll(-1, 0)
        following[-1:] = mixed
        left = min(self.bands, self.rounds - server_round + 1)
        return mixed * float(np.linalg.norm(weights[:left])), {"history": following}


class Drawn(Randomness):
    """Noise that was drawn before, for ``noised`` to add and round onto its grid."""

    def __init__(self, noise: torch.Tensor) -> None:
        self._noise = noise

    def uniform(self, count: int) -> torch.Tensor:
        """Refuses: only noise was drawn."""
        raise NotImplementedError(f"Expected no uniform draws, got {count} asked for.")

    def gaussian(self, count: int) -> torch.Tensor:
        """Returns the noise, of which there must be as much as is asked for."""
        if count != len(self._noise):
            raise ValueError(f"Expected {len(self._noise)} values asked, got {count}.")
        return self._noise


def _column_norms(rounds: int, bands: int) -> Array:
    """Norms before the division: the last columns are cut off by the last row."""
    norms = np.sqrt(np.cumsum(coefficients(bands) ** 2))
    cut: Array = norms[np.minimum(bands, rounds - np.arange(rounds)) - 1]
    return cut
