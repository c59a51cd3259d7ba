"""Per-sample gradients by taps on the operations' outputs: the default source."""

import torch
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations import RULES
from fedpeft.privacy.per_sample import GradientSource
from fedpeft.privacy.rows import Rows


class Taps(GradientSource):
    """Replaces each operation's forward pass by one with a tap, in place."""

    def __init__(self) -> None:
        self._rows = Rows([])

    def bind(self, model: nn.Module, operations: list[Operation]) -> None:
        """Puts the taps.

        Raises:
            ValueError: for a kind of operation without a per-sample rule.
        """
        for operation in operations:
            if operation.kind not in RULES:
                raise ValueError(
                    f"Expected operations of kind {', '.join(RULES)}, got "
                    f"{operation.kind} ({type(operation.module).__name__}): there is "
                    f"no per-sample rule; [privacy] engine = 'opacus' knows more."
                )
        self._rows = Rows(p for p in model.parameters() if p.requires_grad)
        for operation in operations:
            rule = RULES[operation.kind]
            operation.module.forward = rule(operation, self._rows)

    def backward(self, losses: torch.Tensor) -> Rows:
        """Runs backward once."""
        self._rows.backward(losses)
        return self._rows
