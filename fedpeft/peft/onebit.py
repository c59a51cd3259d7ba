"""Low-rank adaptation with weights of one bit, or a few."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import NormalDist

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

_MOST_BITS = 8


@cache
def gaussian_codes(bits: int) -> tuple[float, ...]:
    """Returns the ``2 ** bits`` values that represent a standard Gaussian best.

    By mean absolute error: each value is the median of what is nearest to it.

    >>> [round(code, 4) for code in gaussian_codes(1)]
    [-0.6745, 0.6745]
    """
    normal, count = NormalDist(), 2**bits
    codes = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    for _ in range(500):
        edges = [0.0, *(normal.cdf((a + b) / 2) for a, b in pairwise(codes)), 1.0]
        codes = [normal.inv_cdf((a + b) / 2) for a, b in pairwise(edges)]
    return tuple(codes)


class Quantised(DerivedLinear):
    """A linear layer with a quantised copy of the latent weight that trains.

    The latent weight is standardised as a whole (mean mu, standard deviation sigma) and
    rounded to the nearest code, times sigma, plus mu. Backward the rounding counts as
    the identity and mu and sigma as constants, so that the latent weight's gradient is
    the quantised one's. A weight of equal entries, such as zero, is its own copy.

    Args:
        latent: initial values, shape ``(out, in)``.
        bits: a weight.
    """

    codes: torch.Tensor
    edges: torch.Tensor

    def __init__(self, latent: torch.Tensor, bits: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(latent)
        codes = torch.tensor(gaussian_codes(bits))
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("edges", (codes[1:] + codes[:-1]) / 2, persistent=False)

    def weight_from(self, parameters: Tensors) -> torch.Tensor:
        """Returns the quantised weight."""
        latent = parameters["latent"]
        fixed = latent.detach()
        mean, deviation = fixed.mean(), fixed.std(correction=0)
        standard = (fixed - mean) / deviation.clamp(min=torch.finfo(fixed.dtype).tiny)
        quantised = self.codes[torch.bucketize(standard, self.edges)] * deviation + mean
        return quantised + (latent - fixed)  # adds zero, and the identity's gradient


@dataclass(frozen=True)
class OneBit(PeftMethod):
    """Adds ``(lora_alpha / rank) * B A x`` with A and B of `bits` bits a weight.

    What trains, travels and is averaged are latent weights in full precision, which the
    forward pass quantises: the mean of two clients' quantised weights has more codes
    than either, so the server's state is quantised anew wherever it is used. What is
    left after training takes `bits` bits a weight and two numbers a matrix.

    Attributes:
        rank: of the product.
        bits: a weight, 1 to 8.
        lora_alpha: scale of the product; None means ``2 * rank``.
        target_modules: ends of the layers' names; None takes query and value.
        first_layer: adapt only in this layer and above.

    Source: Jie et al. (2023), Revisiting the Parameter Efficiency of Adapters from the
    Perspective of Precision Redundancy, section 3. There B starts from small random
    values, here from zero, so that the backbone is unchanged until it learns something;
    and there the gradient passes through mu and sigma, here it does not: sigma has no
    gradient at zero.
    """

    rank: int = 8
    bits: int = 1
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    first_layer: int = 0

    def __post_init__(self) -> None:
        check_positive(rank=self.rank, bits=self.bits)
        if self.bits > _MOST_BITS:
            raise ValueError(f"Expected bits <= {_MOST_BITS}, got {self.bits}.")
        check_above_zero(lora_alpha=self.lora_alpha)
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts the quantised layers beside the frozen ones; B starts at zero.

        Raises:
            ValueError: if no layer matches, or the rank is above a layer's size.
        """
        freeze(backbone)
        alpha = 2 * self.rank if self.lora_alpha is None else self.lora_alpha
        operations = []
        for name, base in targets(
            backbone, self.target_modules, self.first_layer, self.rank
        ):
            latent = torch.empty(self.rank, base.in_features)
            nn.init.kaiming_uniform_(latent, a=math.sqrt(5))
            down = Quantised(latent, self.bits)
            up = Quantised(torch.zeros(base.out_features, self.rank), self.bits)
            beside = Beside(base, alpha / self.rank, down=down, up=up)
            backbone.set_submodule(name, beside)
            operations += [*down.operations, *up.operations]
        return operations

    def merge(self, backbone: nn.Module) -> None:
        """Adds the quantised products to the frozen weights."""
        merge(backbone)

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns a LoRA with the quantised A and B."""
        return as_lora(backbone)
