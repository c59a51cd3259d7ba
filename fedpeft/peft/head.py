"""Head-only: the backbone stays as it is; the task head alone is trained."""

from dataclasses import dataclass

from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import freeze


@dataclass(frozen=True)
class Head(PeftMethod):
    """Adds nothing. The baseline of every comparison (linear probing)."""

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Freezes the backbone."""
        freeze(backbone)
        return []

    def merge(self, backbone: nn.Module) -> None:
        """Has nothing to do: it changes nothing of the backbone."""
