"""Low-rank adaptation by sums of random matrices."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.interfaces import Operation, PeftAdapter, PeftMethod
from fedpeft.peft._beside import Beside, as_lora, merge, targets
from fedpeft.peft._derived import DerivedLinear
from fedpeft.peft._layers import (
    check_above_zero,
    check_first_layer,
    check_positive,
    freeze,
)
from fedpeft.tensors import Tensors


class Combination(DerivedLinear):
    """A linear layer with the weight ``sum_i c_i W_i`` of fixed, random W_i.

    The W_i are a buffer of ``num_bases * inputs * outputs`` values, drawn from torch's
    global generator: a seed restores them, so that no trainable state holds them.

    Args:
        inputs: features.
        outputs: features.
        num_bases: how many W_i.
        start: of every coefficient.
        bound: entries are uniform between its negative and itself.
    """

    bases: torch.Tensor

    def __init__(
        self, inputs: int, outputs: int, *, num_bases: int, start: float, bound: float
    ) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.full((num_bases,), start))
        bases = torch.empty(num_bases, outputs, inputs).uniform_(-bound, bound)
        self.register_buffer("bases", bases, persistent=False)

    def weight_from(self, parameters: Tensors) -> torch.Tensor:
        """Returns the sum."""
        total: torch.Tensor = torch.tensordot(parameters["coefficients"], self.bases, 1)
        return total


@dataclass(frozen=True)
class Nola(PeftMethod):
    """Adds ``(lora_alpha / rank) * B A x``, A and B sums of random matrices.

    ``A = sum_i alpha_i A_i`` and ``B = sum_j beta_j B_j``, where alpha and beta alone
    train and travel: ``2 * num_bases`` values a layer, whatever its size and the rank.
    The A_i and B_j come from the run's seed at every client and are never sent. In
    memory, and in the finished run's model, they take ``4 * num_bases * rank * (in +
    out)`` bytes a layer: at the defaults 1.5 MiB for one of 768 x 768.

    Attributes:
        rank: of the product.
        num_bases: how many A_i, and how many B_j.
        lora_alpha: scale of the product; None means ``2 * rank``.
        freeze_alpha: train beta alone. The product is then linear in what trains: the
            mean of the clients' products is the product of the mean, and noise enters
            linearly.
        target_modules: ends of the layers' names; None takes query and value.
        first_layer: adapt only in this layer and above.

    Source: Koohpayegani et al. (2024), NOLA, section 3. Beta starts at zero; in the
    authors' code as alpha does. Entries are uniform, so scaled that A starts with the
    variance of LoRA's A and that beta's gradient is about as long as LoRA's B's.
    """

    rank: int = 4
    num_bases: int = 64
    lora_alpha: float | None = None
    freeze_alpha: bool = False
    target_modules: tuple[str, ...] | None = None
    first_layer: int = 0

    def __post_init__(self) -> None:
        check_positive(rank=self.rank, num_bases=self.num_bases)
        check_above_zero(lora_alpha=self.lora_alpha)
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts the sums beside the layers.

        Raises:
            ValueError: if no layer matches, or the rank is above a layer's size.
        """
        freeze(backbone)
        alpha = 2 * self.rank if self.lora_alpha is None else self.lora_alpha
        operations = []
        for name, base in targets(
            backbone, self.target_modules, self.first_layer, self.rank
        ):
            down = self._sum(base.in_features, self.rank, 1.0, base.in_features)
            up = self._sum(self.rank, base.out_features, 0.0, 1)
            down.requires_grad_(not self.freeze_alpha)
            beside = Beside(base, alpha / self.rank, down=down, up=up)
            backbone.set_submodule(name, beside)
            operations += [*down.operations, *up.operations]
        return operations

    def _sum(self, inputs: int, outputs: int, start: float, fan: int) -> Combination:
        bound = 1 / math.sqrt(self.num_bases * fan)
        return Combination(
            inputs, outputs, num_bases=self.num_bases, start=start, bound=bound
        )

    def merge(self, backbone: nn.Module) -> None:
        """Adds the products to the frozen weights."""
        merge(backbone)

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns a LoRA with A and B as they are now."""
        return as_lora(backbone)
