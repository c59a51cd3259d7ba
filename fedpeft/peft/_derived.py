"""Linear layers whose weight is a function of a few trainable values."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.tensors import Tensors


class DerivedLinear(nn.Module, ABC):
    """``F.linear(x, weight, bias)`` with a weight that :meth:`weight_from` computes.

    Shapes: ``(batch, ..., in)`` -> ``(batch, ..., out)``.
    """

    @abstractmethod
    def weight_from(self, parameters: Tensors) -> torch.Tensor:
        """Returns the weight, shape ``(out, in)``, of parameters by name."""

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen layer's, where the weight stands in for a frozen layer's."""
        return None

    @property
    def weight(self) -> torch.Tensor:
        """The weight now."""
        return self.weight_from(dict(self.named_parameters(recurse=False)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the weight."""
        return F.linear(x, self.weight, self.bias)

    @property
    def operations(self) -> list[Operation]:
        """How its parameters act; none if they are frozen."""
        own = self.named_parameters(recurse=False)
        parameters = {name: p for name, p in own if p.requires_grad}
        return [Operation(self, "weight", parameters)] if parameters else []
