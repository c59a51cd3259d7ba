"""Per-sample rules: kind of operation -> the module's forward pass with a tap."""

from collections.abc import Callable

from fedpeft.interfaces import Operation, OperationKind
from fedpeft.privacy.operations import (
    bias,
    counts,
    embedding,
    linear,
    module,
    norm,
    pool,
    scale_shift,
    tokens,
    weight,
)
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.rows import Rows

RULES: dict[OperationKind, Callable[[Operation, Rows], Forward]] = {
    "linear": linear.forward,
    "scale_shift": scale_shift.forward,
    "bias": bias.forward,
    "norm": norm.forward,
    "tokens": tokens.forward,
    "embedding": embedding.forward,
    "pool": pool.forward,
    "counts": counts.forward,
    "weight": weight.forward,
    "module": module.forward,
}

__all__ = ["RULES", "Forward"]
