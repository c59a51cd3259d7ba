"""A task's network: backbone, pooling and head."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from fedpeft.interfaces import FrozenPart, Operation
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
        self.head = nn.Linear(num_features, num_labels) if num_labels else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

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
        return [Operation(self.head, "linear", dict(self.head.named_parameters()))]

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
        return part and part.compute(self.backbone, inputs)

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
