"""A rule and a server optimiser, as one aggregator."""

from collections.abc import Iterable
from dataclasses import dataclass

from fedpeft.aggregation.server_optimizers import ServerOptimizer
from fedpeft.interfaces import Aggregator, State, Update
from fedpeft.tensors import Tensors, with_prefix, without_prefix


@dataclass(frozen=True)
class Optimized(Aggregator):
    """Wraps an aggregator and applies a server optimiser to its result.

    The states of both lie side by side, under ``inner.`` and ``optimizer.``.

    Attributes:
        inner: the rule that consumes the updates.
        optimizer: what turns its result into the step.
    """

    inner: Aggregator
    optimizer: ServerOptimizer

    def init(self, like: Tensors) -> State:
        """Returns both states before the first round."""
        return _joined(self.inner.init(like), self.optimizer.init(like))

    def aggregate(
        self, updates: Iterable[Update], state: State
    ) -> tuple[Tensors, State]:
        """Returns the optimiser's step for the rule's result, and both next states."""
        aggregate, inner = self.inner.aggregate(updates, without_prefix("inner", state))
        step, optimizer = self.optimizer.apply(
            aggregate, without_prefix("optimizer", state)
        )
        return step, _joined(inner, optimizer)


def _joined(inner: State, optimizer: State) -> State:
    return with_prefix("inner", inner) | with_prefix("optimizer", optimizer)
