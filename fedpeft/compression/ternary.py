"""The signs of the largest values of every tensor group, times one scale."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft.compression import entropy
from fedpeft.compression.groups import group_tensors
from fedpeft.compression.header import float32, open_header, template_check, varint
from fedpeft.compression.selection import check_density, largest, num_kept
from fedpeft.compression.values import from_vector, to_vector
from fedpeft.errors import InvalidPayload
from fedpeft.interfaces import Compressor, Payload
from fedpeft.tensors import Tensors


def ternarize(values: torch.Tensor, density: float) -> tuple[torch.Tensor, float]:
    """Returns signs s in {-1, 0, 1} and the scale a that minimises ``||t - a s||``.

    The signs mark the ``ceil(density * n)`` values t of largest magnitude, the first
    of equals; a zero among them keeps the sign 0. Setting the derivative of
    ``||t - a s||**2`` to zero gives ``a = <t, s> / <s, s>``: the mean magnitude of what
    has a sign. If nothing has, the scale is 0.

    Args:
        values: shape ``(n,)``.
        density: share that is kept.

    >>> ternarize(torch.tensor([1.0, -4.0, 2.0, 0.5]), density=0.5)
    (tensor([ 0., -1.,  1.,  0.]), 3.0)
    """
    marked = largest(values, num_kept(density, len(values)))
    signs = torch.where(marked, values.sign(), 0.0)
    magnitude = values[marked].abs().sum(dtype=torch.float64).item()
    return signs, magnitude / max(int(signs.count_nonzero()), 1)


@dataclass(frozen=True)
class Ternary(Compressor):
    """Sends, per tensor group, which values are largest, their signs and one scale.

    **Guarantees**: at most ``ceil(density * n)`` of a group's n values are not zero,
    and all have the group's scale as magnitude; zeros stay zeros; no other scale gives
    a smaller squared error for these signs, and the error's norm never exceeds the
    group's. Biased: small values always become zero and large ones shrink; wrap it in
    ``ErrorFeedback``.

    Header: template check, then per group the counts of negative and positive values
    and, if there are any, the scale in fp32. Body: the entropy-coded signs, about
    ``H(density) + density`` bits a value with H the binary entropy: 0.92 at 0.2.

    Source: Sattler et al. (2019), Sparse Ternary Compression, arXiv:1903.02891; on
    PEFT updates, Yadav et al. (2023), ComPEFT, arXiv:2311.13171, whose one scale for
    all tensors is here one a group.

    Attributes:
        density: share of each group that is kept, ``0 < density <= 1``.

    Example:
        >>> update = {"a": torch.arange(-5000.0, 5000.0)}
        >>> payload = Ternary(density=0.2).compress(update, torch.Generator())
        >>> 4 * 10_000 / len(payload.to_bytes()) > 33
        True
    """

    codec: ClassVar[str] = "ternary"
    version: ClassVar[int] = 1

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def compress(self, update: Tensors, rng: torch.Generator) -> Payload:
        """Compresses finite tensors; deterministic, draws nothing."""
        del rng
        vector = to_vector(update)
        header = template_check(update)
        symbols: list[entropy.Symbols] = []
        counts: list[entropy.Counts] = []
        for group in group_tensors(update):
            signs, scale = ternarize(group.of(vector), self.density)
            symbols.append((signs + 1).int().numpy())
            counts.append(entropy.count_symbols(symbols[-1], alphabet=3))
            negative, _, positive = counts[-1]
            header += varint(negative) + varint(positive)
            header += float32(scale) if negative + positive else b""
        body = entropy.encode(symbols, counts)
        return Payload(self.codec, self.version, header, body)

    def decompress(self, payload: Payload, like: Tensors) -> Tensors:
        """Restores sign times scale."""
        counts, scales = self._read_header(payload, like)
        vector = torch.zeros(sum(t.numel() for t in like.values()))
        symbols = entropy.decode(payload.body, counts)
        for group, signs, scale in zip(
            group_tensors(like), symbols, scales, strict=True
        ):
            group.of(vector).copy_((torch.from_numpy(signs) - 1) * scale)
        return from_vector(vector, like)

    def entropy_bits(self, payload: Payload, like: Tensors) -> float:
        """Returns the entropy of the signs."""
        counts, _ = self._read_header(payload, like)
        return entropy.entropy_bits(counts)

    def _read_header(
        self, payload: Payload, like: Tensors
    ) -> tuple[list[entropy.Counts], list[float]]:
        reader = open_header(payload, like, codec=self.codec, version=self.version)
        counts: list[entropy.Counts] = []
        scales: list[float] = []
        for group in group_tensors(like):
            kept = num_kept(self.density, group.size)
            negative = reader.varint(kept)
            positive = reader.varint(kept - negative)
            # A group of zeros has no scale, and none is needed.
            scale = reader.float32() if negative + positive else 1.0
            if not 0 < scale < math.inf:
                raise InvalidPayload(f"Expected a finite scale > 0, got {scale}.")
            counts.append((negative, group.size - negative - positive, positive))
            scales.append(scale)
        reader.end()
        return counts, scales
