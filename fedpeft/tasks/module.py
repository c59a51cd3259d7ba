"""A task's network: backbone, pooling and head."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from fedpeft.interfaces import FrozenPart, HeadMaker, Operation
from fedpeft.tasks.frozen import find_frozen_part


class TaskModule(nn.Module, ABC):
    """Backbone, features and, for classes, a linear head.

    The head is part of the model and always trainable. It starts at zero, so that all
    classes are equally likely at first whatever the backbone.

    Args:
        backbone: with its method.
        num_features: of what :meth:`pool` returns.
        num_labels: outputs of the head; 0 for none.
    """

    def __init__(self, backbone: nn.Module, num_features: int, num_labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = _head(backbone, num_features, num_labels) if num_labels else None

    @abstractmethod
    def pool(
        self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Maps the last hidden state ``(batch, tokens, features)`` to features."""

    @property
    def head_operations(self) -> list[Operation]:
        """How the head's parameters act."""
        if self.head is None:
            return []
        return [
            Operation(layer, "linear", dict(layer.named_parameters()))
            for layer in self.head.modules()
            if isinstance(layer, nn.Linear)
        ]

    @property
    def frozen_part(self) -> FrozenPart | None:
        """What depends on an example alone; None where something trains from below.

        A backbone of which nothing trains is not meant here: then the features
        themselves may be kept.
        """
        return find_frozen_part(self.backbone)

    @property
    def keeps_features(self) -> bool:
        """Whether nothing below the head trains."""
        return not any(p.requires_grad for p in self.backbone.parameters())

    @torch.no_grad()
    def keep(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Returns what never changes for these inputs; None if everything may."""
        if self.keeps_features and self.head is not None:
            return self.pool(self.backbone(**inputs).last_hidden_state, inputs)
        part = self.frozen_part
        return None if part is None else part.compute(self.backbone, inputs)

    def features(
        self, inputs: dict[str, torch.Tensor], kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns what the head reads, from `kept` if it is at hand."""
        if kept is None:
            return self.pool(self.backbone(**inputs).last_hidden_state, inputs)
        if self.keeps_features and self.head is not None:
            return kept
        part = self.frozen_part
        assert part is not None
        return self.pool(part.resume(self.backbone, inputs, kept), inputs)


def _head(backbone: nn.Module, num_features: int, num_labels: int) -> nn.Module:
    """Returns the head that the method makes, else a linear layer; all zeros."""
    makers = [module for module in backbone.modules() if isinstance(module, HeadMaker)]
    make = makers[0].make_head if makers else nn.Linear
    head: nn.Module = make(num_features, num_labels)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head
