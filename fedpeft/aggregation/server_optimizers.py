"""Server optimisers: from the round's aggregate to the step that is taken.

The aggregate is an update, to be added, so these formulas add where a textbook on
gradients subtracts. State is named tensors, zeros or constants before the first round,
so it checkpoints with the model.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from fedpeft.interfaces import State
from fedpeft.tensors import (
    Tensors,
    add,
    scale,
    with_prefix,
    without_prefix,
    zeros_like,
)


class ServerOptimizer(ABC):
    """A frozen dataclass of hyperparameters, and two pure functions."""

    @abstractmethod
    def init(self, like: Tensors) -> State:
        """Returns the state before the first round, in the dtypes of `like`."""

    @abstractmethod
    def apply(self, aggregate: Tensors, state: State) -> tuple[Tensors, State]:
        """Returns the step tensors, to be added, and the next state."""


@dataclass(frozen=True)
class ServerSGD(ServerOptimizer):
    """Takes the aggregate times a learning rate; 1.0 is plain averaging.

    Source: Reddi et al. (2021), arXiv:2003.00295, algorithm 1.
    """

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)

    def init(self, like: Tensors) -> State:
        """Returns the empty state."""
        del like
        return {}

    def apply(self, aggregate: Tensors, state: State) -> tuple[Tensors, State]:
        """Returns ``learning_rate * aggregate``."""
        return scale(aggregate, self.learning_rate), state


@dataclass(frozen=True)
class ServerMomentum(ServerOptimizer):
    """Sums the aggregates of past rounds, each round ago times `momentum` once more.

    Aggregates that stay the same are taken ``1 / (1 - momentum)`` times in the limit:
    lower the learning rate by that factor to compare with plain averaging.

    Source: Hsu et al. (2019), FedAvgM, arXiv:1909.06335.
    """

    learning_rate: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)
        _check_decay("momentum", self.momentum)

    def init(self, like: Tensors) -> State:
        """Returns a velocity of zero."""
        return with_prefix("velocity", zeros_like(like))

    def apply(self, aggregate: Tensors, state: State) -> tuple[Tensors, State]:
        """Returns ``learning_rate * v`` with ``v = momentum * v + aggregate``."""
        before = without_prefix("velocity", state)
        velocity = add(aggregate, scale(before, self.momentum))
        return scale(velocity, self.learning_rate), with_prefix("velocity", velocity)


@dataclass(frozen=True)
class ServerAdam(ServerOptimizer):
    """Divides the mean of past aggregates by their root mean square, value by value.

    Without bias correction, as in the source. The second moment starts at ``tau**2``
    and not at zero, so no first step explodes. With the default betas both moments are
    short by the same factor in the first round (``0.1`` and ``sqrt(0.01)``): a value
    well above `tau` moves by about the learning rate at once, by up to 2.2 times it
    around round 13, while the first moment is full and the second is not, and settles
    back. With correction the state would have to count rounds.

    Source: Reddi et al. (2021), arXiv:2003.00295, algorithm 2, FedAdam.

    Attributes:
        learning_rate: how far a value moves a round, about; not relative to clients'.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: degree of adaptivity, in units of the aggregate; values well below it are
            hardly amplified, so it also holds back noise.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)
        _check_decay("beta1", self.beta1)
        _check_decay("beta2", self.beta2)
        _check_positive("tau", self.tau)

    def init(self, like: Tensors) -> State:
        """Returns a first moment of zero and a second of ``tau**2``."""
        second = {
            name: torch.full_like(tensor, self.tau**2) for name, tensor in like.items()
        }
        return _moments(zeros_like(like), second)

    def apply(self, aggregate: Tensors, state: State) -> tuple[Tensors, State]:
        """Returns ``learning_rate * m / (sqrt(v) + tau)`` with the new moments."""
        first = _decayed(without_prefix("first_moment", state), aggregate, self.beta1)
        squares = {name: tensor.square() for name, tensor in aggregate.items()}
        second = _decayed(without_prefix("second_moment", state), squares, self.beta2)
        step = {
            name: self.learning_rate * first[name] / (second[name].sqrt() + self.tau)
            for name in aggregate
        }
        return step, _moments(first, second)


def _moments(first: Tensors, second: Tensors) -> State:
    return with_prefix("first_moment", first) | with_prefix("second_moment", second)


def _decayed(before: Tensors, now: Tensors, decay: float) -> Tensors:
    """Returns ``decay * before + (1 - decay) * now``, names in the order of `now`."""
    return add(scale(now, 1 - decay), scale(before, decay))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"Expected a finite {name} > 0, got {value}.")


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"Expected 0 <= {name} < 1, got {value}.")
