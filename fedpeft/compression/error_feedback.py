"""Error feedback: what compression lost is added to the next update."""

from dataclasses import dataclass

import torch

from fedpeft.interfaces import Compressor, Payload
from fedpeft.tensors import Tensors, add, subtract


@dataclass(frozen=True)
class ErrorFeedback:
    """Wraps a compressor and carries its error from round to round.

    **Guarantees**: the sums telescope. Over any number of rounds, starting from a zero
    residual, the decoded payloads sum to the sum of the updates minus the last residual
    (up to fp32 rounding), whatever the compressor. So a biased compressor delays, it
    does not lose: as long as residuals stay bounded, the mean error of a round goes to
    zero.

    Not guaranteed: that a single payload is close to its update, or bounded by it, as
    it may carry several rounds at once. Where a norm must be bounded, clip what was
    decoded, never what is fed back.

    The residual is a client's own state. It holds what was *not* released and never
    leaves the client; without privacy it is as revealing as the update itself. If the
    updates are the output of a private mechanism, all of this is post-processing.

    Source: Seide et al. (2014), 1-Bit Stochastic Gradient Descent (Interspeech);
    Karimireddy et al. (2019), arXiv:1901.09847, EF-SGD.

    Attributes:
        compressor: the compressor; what it sends is decoded by it alone.
    """

    compressor: Compressor

    def compress(
        self, update: Tensors, residual: Tensors, rng: torch.Generator
    ) -> tuple[Payload, Tensors]:
        """Compresses ``update + residual``.

        Args:
            update: finite tensors.
            residual: what the previous call returned; zeros before the first.
            rng: for the compressor.

        Returns:
            The payload, and the next residual: the sum minus what the payload decodes
            to. To keep a run resumable, store the residual before the payload is sent.

        Raises:
            ValueError: if a value is not finite, or the residual is another method's.
        """
        _check_same_template(update, residual)
        total = add(update, residual)
        payload = self.compressor.compress(total, rng)
        decoded = self.compressor.decompress(payload, like=total)
        return payload, subtract(total, decoded)


def _check_same_template(update: Tensors, residual: Tensors) -> None:
    shapes = {name: tensor.shape for name, tensor in update.items()}
    if shapes != {name: tensor.shape for name, tensor in residual.items()}:
        raise ValueError(
            f"Expected a residual with the {len(shapes)} names and shapes of the "
            f"update, got {len(residual)} others; start from zeros when the method "
            "changes."
        )
