"""A small square matrix between two fixed ones."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from fedpeft.interfaces import Operation, PeftAdapter, PeftMethod
from fedpeft.peft._beside import Beside, as_lora, merge, targets
from fedpeft.peft._layers import (
    check_above_zero,
    check_first_layer,
    check_positive,
    freeze,
)

Init = Literal["random", "svd"]


@dataclass(frozen=True)
class FedSB(PeftMethod):
    """Adds ``scale * B R A x``: R, rank x rank, trains between fixed A and B.

    The product is linear in R. So the mean of the clients' products is the product of
    the mean, exactly, and noise enters linearly, while ``rank ** 2`` values a layer
    travel, whatever its size. The rows of A and the columns of B are orthonormal: the
    gradient of R is the frozen weight's, projected, and never longer.

    Attributes:
        rank: features between A and B.
        scale: of the product.
        target_modules: ends of the layers' names; None takes query and value.
        first_layer: adapt only in this layer and above.
        init: A and B at ``random`` from the run's seed, or by ``svd`` the leading
            singular vectors of the frozen weight, which need no seed. Computed in
            double precision, they agree between machines to single precision as far as
            the singular values are apart.

    Source: Singhal et al. (2025), Fed-SB, section 3. There A, B and the first R come
    from the gradient of some examples, which under privacy would have to be charged:
    here R starts at zero.
    """

    rank: int = 16
    scale: float = 1.0
    target_modules: tuple[str, ...] | None = None
    first_layer: int = 0
    init: Init = "random"

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)
        check_above_zero(scale=self.scale)
        check_first_layer(self.first_layer)
        if self.init not in get_args(Init):
            raise ValueError(
                f"Expected init in {', '.join(get_args(Init))}, got {self.init!r}."
            )

    @property
    def starts_from_weights(self) -> bool:
        """Whether A and B are the frozen weight's singular vectors."""
        return self.init == "svd"

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts the three matrices beside the layers; R is a plain linear operation.

        Raises:
            ValueError: if no layer matches, or the rank is above a layer's size.
        """
        freeze(backbone)
        operations = []
        for name, base in targets(
            backbone, self.target_modules, self.first_layer, self.rank
        ):
            down, up = self._fixed(base)
            core = _linear(torch.zeros(self.rank, self.rank))
            beside = Beside(
                base, self.scale, down=_linear(down), core=core, up=_linear(up)
            )
            beside.requires_grad_(False)
            core.requires_grad_(True)
            backbone.set_submodule(name, beside)
            operations.append(Operation(core, "linear", dict(core.named_parameters())))
        return operations

    def _fixed(self, base: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A ``(rank, in)`` and B ``(out, rank)``."""
        if self.init == "svd":
            return _leading(base.weight.detach(), self.rank)
        down = _orthonormal(base.in_features, self.rank).T
        return down, _orthonormal(base.out_features, self.rank)

    def merge(self, backbone: nn.Module) -> None:
        """Adds the products to the frozen weights."""
        merge(backbone)

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns a LoRA with A and B R as its factors."""
        return as_lora(backbone)


def _orthonormal(size: int, rank: int) -> torch.Tensor:
    """Returns random orthonormal columns, shape ``(size, rank)``."""
    q, r = torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64))
    signed: torch.Tensor = q * r.diagonal().sign()  # else the library's choice
    return signed.float()


def _leading(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the leading right and left singular vectors.

    The largest entry of each row of A is positive, which fixes the signs of both.
    """
    u, _, v = torch.linalg.svd(weight.double(), full_matrices=False)
    down, up = v[:rank], u[:, :rank]
    largest = down.gather(1, down.abs().argmax(1, keepdim=True)).sign()
    return (down * largest).float(), (up * largest.T).float()


def _linear(weight: torch.Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous())
    return linear
