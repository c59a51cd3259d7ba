"""Randomness of a private release: Poisson batches, and noise on a grid.

Noise from a generator whose state can be guessed or reconstructed protects nothing, so
:class:`SecureRandomness` is the default; :class:`SeededRandomness` is for tests and
reproductions alone.

>>> randomness = SeededRandomness(0)
>>> noised(torch.zeros(4), standard_deviation=1.0, randomness=randomness).shape
torch.Size([4])
>>> poisson_batch(3, sampling_rate=1.0, randomness=randomness)
[0, 1, 2]
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

# Pairs of Gaussians made at once: bounds memory, and fits a processor's cache.
_CHUNK_PAIRS = 1 << 13
# A noised value is a multiple of a power of two between 2^-11 and 2^-10 of the standard
# deviation. Rounding adds less than a ten millionth to the noise's variance.
_GRID_BITS = 10


class Randomness(ABC):
    """Independent draws, in double precision on the CPU."""

    @abstractmethod
    def uniform(self, count: int) -> torch.Tensor:
        """Returns uniform values of 53 bits in [0, 1), float64, shape ``(count,)``."""

    @abstractmethod
    def gaussian(self, count: int) -> torch.Tensor:
        """Returns standard Gaussian values, float64, shape ``(count,)``."""


class SecureRandomness(Randomness):
    """Draws that nobody can predict or repeat: an AES-256-CTR keystream.

    **Guarantees**: every chunk of a draw has its own key from the operating system,
    used once and kept nowhere. There is no state that a forked process, a pickled copy,
    a second thread or a restored snapshot could share, hence no stream that could
    repeat. Gaussians reach out to 13.3 standard deviations, with full precision on the
    way; the probability beyond is 2^-129. Differential privacy becomes a computational
    guarantee: against whoever cannot break AES (Mironov et al. 2009, CRYPTO).
    """

    def uniform(self, count: int) -> torch.Tensor:
        """Returns uniform values; see :meth:`Randomness.uniform`."""
        return torch.from_numpy((_keystream(count) >> np.uint64(11)) * 2.0**-53)

    def gaussian(self, count: int) -> torch.Tensor:
        """Returns standard Gaussian values; see :meth:`Randomness.gaussian`."""
        values = np.empty(count)
        for start in range(0, count, 2 * _CHUNK_PAIRS):
            size = min(2 * _CHUNK_PAIRS, count - start)
            pairs = -(-size // 2)
            drawn = _gaussian_pairs(_keystream(3 * pairs).reshape(3, pairs))
            values[start : start + size] = drawn[:size]
        return torch.from_numpy(values)


class SeededRandomness(Randomness):
    """Draws that the same seed repeats bit for bit: for tests and reproductions.

    **Guarantees**: none of privacy. Whoever knows or guesses the seed subtracts the
    noise. Equal values for equal seeds, versions of torch and order of calls.

    Args:
        seed: derive it with :func:`fedpeft.seeds.derive_seed` from all that should tell
            two streams apart (run, client, round): two uses must not share one.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator()
        self._generator.manual_seed(seed)

    def uniform(self, count: int) -> torch.Tensor:
        """Returns uniform values; see :meth:`Randomness.uniform`."""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)

    def gaussian(self, count: int) -> torch.Tensor:
        """Returns standard Gaussian values; see :meth:`Randomness.gaussian`."""
        return torch.randn(count, generator=self._generator, dtype=torch.float64)


def noised(
    total: torch.Tensor, standard_deviation: float, randomness: Randomness
) -> torch.Tensor:
    """Returns `total` plus Gaussian noise on every coordinate, on a public grid.

    Floating-point numbers are not reals. The sum of a value and a float64 noise can
    take some low-order bits and not others, and which ones depends on the value:
    whoever sees all bits may tell two neighbouring totals apart for certain (Mironov
    2012 and Holohan & Braghin 2021 for Laplace noise; Jin et al. 2022 for Gaussian
    noise and DP-SGD). So the sum is made in float64 and rounded to the multiples of a
    power of two near 2^-10 standard deviations.

    **Guarantees**: rounding is a function of the noised sum and of the public standard
    deviation alone, that is, post-processing: it cannot cost privacy. About 2^40 values
    of the noise fall into each cell, so every cell is within reach of every
    neighbouring total. For totals within 256 standard deviations, double precision
    moves a cell's edge by less than 2^-44 of these and its probability by less than
    2^-32 of itself: if the errors of 30 million released numbers all conspired, they
    would add 0.02 to epsilon. Standard deviation 0: nothing is added or rounded.

    **Not guaranteed**: an exact discrete Gaussian with a proof (Canonne et al. 2020).
    What happens before: summing examples in floating point exceeds the clipping norm
    by rounding errors, about 1e-6 of it in float32 (Casacuberta et al. 2022). That the
    time it takes reveals nothing (Jin et al. 2022).

    Args:
        total: float32 or float64, any shape and device.
        standard_deviation: of the noise, in the unit of `total`:
            ``noise_multiplier * clipping_norm``.
        randomness: where the noise comes from.

    Returns:
        float32, the shape and device of `total`.

    Raises:
        ValueError: for a standard deviation that is negative, infinite or NaN.

    Source:
        Mironov (2012), "On significance of the least significant bits for differential
        privacy", CCS; Holohan & Braghin (2021),
        https://arxiv.org/abs/2107.10138; Jin et al. (2022),
        https://arxiv.org/abs/2112.05307; Casacuberta et al. (2022),
        https://arxiv.org/abs/2207.10635; Canonne et al. (2020),
        https://arxiv.org/abs/2004.00010.
    """
    if not 0 <= standard_deviation < math.inf:
        raise ValueError(
            f"Expected a finite standard_deviation >= 0, got {standard_deviation}."
        )
    if standard_deviation == 0:
        return total.to(torch.float32)
    drawn = randomness.gaussian(total.numel())
    noise = drawn.to(total.device, non_blocking=drawn.is_pinned()).view(total.shape)
    cell = grid(standard_deviation)
    values = total.to(torch.float64) + noise * standard_deviation
    return values.div_(cell).round_().mul_(cell).to(torch.float32)


def grid(standard_deviation: float) -> float:
    """Returns the power of two whose multiples :func:`noised` releases.

    >>> grid(1.0) == grid(1.9) == 2.0**-10
    True
    """
    _, exponent = math.frexp(standard_deviation)
    return math.ldexp(1.0, exponent - 1 - _GRID_BITS)


def poisson_batch(
    num_examples: int, sampling_rate: float, randomness: Randomness
) -> list[int]:
    """Returns the indices of one Poisson batch, ascending; it may be empty.

    **Guarantees**: every index is in the batch with probability `sampling_rate`
    (exact to 2^-53), independently of all others.

    Args:
        num_examples: how many examples the client holds; may be 0.
        sampling_rate: in (0, 1].
        randomness: where the decisions come from.

    Raises:
        ValueError: for a rate outside (0, 1].
    """
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"Expected 0 < sampling_rate <= 1, got {sampling_rate}.")
    chosen = randomness.uniform(num_examples) < sampling_rate
    indices: list[int] = chosen.nonzero().flatten().tolist()
    return indices


def sample(
    indices: Sequence[int], most: int | None, randomness: Randomness
) -> list[int]:
    """Returns the indices, or `most` of them, drawn uniformly and in their order.

    >>> sample([4, 7, 9], 5, SeededRandomness(0))
    [4, 7, 9]
    """
    if most is None or len(indices) <= most:
        return list(indices)
    order = randomness.uniform(len(indices)).argsort()
    return [indices[place] for place in sorted(order[:most].tolist())]


def _keystream(words: int) -> npt.NDArray[np.uint64]:
    """Returns 64-bit words of AES-256-CTR under a fresh key, shape ``(words,)``."""
    # A key encrypts one stream and is dropped, so the counter may start at zero.
    cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16)))
    return np.frombuffer(cipher.encryptor().update(bytes(8 * words)), np.uint64)


def _gaussian_pairs(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Turns words, shape ``(3, pairs)``, into Gaussians, shape ``(2 * pairs,)``.

    Box & Muller (1958). Two words make the radius: its uniform has full relative
    precision down to 2^-129, where 53 or 64 bits would leave gaps in the tail.
    """
    fraction = (words[1] + 0.5) * 2.0**-64
    radius = np.sqrt(-2.0 * np.log((words[0] + fraction) * 2.0**-64))
    # Torch's sine and cosine take a third of numpy's time.
    angle = torch.from_numpy(words[2] * (2.0**-64 * 2.0 * math.pi))
    waves = torch.cat([torch.cos(angle), torch.sin(angle)]).numpy()
    waves.reshape(2, -1)[:] *= radius
    return waves
