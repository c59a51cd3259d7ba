"""The mean of the updates: federated averaging."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fedpeft.interfaces import Aggregator, State, Update
from fedpeft.tensors import Tensors

Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True)
class Mean(Aggregator):
    """Averages the updates.

    **Guarantees**: the stream is consumed once; beside its results, one fp64 sum and
    one update are held, however many clients there are. Equal fp32 updates give that
    update exactly. Sums are taken in fp64: the order in which updates come changes a
    value by at most about ``2**-52`` times the sum of magnitudes, which fp32 mostly
    rounds away; the caller sorts them where runs must be bit-identical. There is no
    robustness: a client moves the mean by its share of the weight times its update,
    however large that is.

    Source: McMahan et al. (2017), arXiv:1602.05629, algorithm 1, which weights by
    examples.

    Attributes:
        weighting: ``uniform`` counts every client once. ``examples`` weights a client
            by its number of examples; where privacy is claimed that number is secret
            and the configuration refuses it.
    """

    weighting: Weighting = "uniform"

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise ValueError(
                f"Expected weighting in {', '.join(get_args(Weighting))}, got "
                f"{self.weighting!r}."
            )

    def init(self, like: Tensors) -> State:
        """Returns the empty state: nothing is remembered."""
        del like
        return {}

    def aggregate(
        self, updates: Iterable[Update], state: State
    ) -> tuple[Tensors, State]:
        """Returns the weighted mean, in the dtypes of the first update.

        Raises:
            ValueError: if the stream is empty, the updates differ in names or shapes,
                or a weight is missing, negative, or zero for all.
        """
        total_weight = 0
        dtypes: dict[str, torch.dtype] = {}
        sums: Tensors = {}
        for update in updates:
            if not dtypes:
                dtypes = {name: t.dtype for name, t in update.tensors.items()}
                sums = {name: _zeros(t) for name, t in update.tensors.items()}
            weight = self._weight(update)
            _accumulate(sums, update.tensors, weight)
            total_weight += weight
            # Else it would live on while the stream decodes the next one.
            del update
        if total_weight == 0:
            raise ValueError(
                "Expected at least one update of positive weight, got none; a round "
                "without replies must not reach the aggregator."
            )
        mean = {name: (s / total_weight).to(dtypes[name]) for name, s in sums.items()}
        return mean, state

    def _weight(self, update: Update) -> int:
        if self.weighting == "uniform":
            return 1
        if update.num_examples is None:
            raise ValueError(
                "Expected num_examples with every update for weighting = 'examples', "
                "got None: under privacy a client does not tell it; use 'uniform'."
            )
        if update.num_examples < 0:
            raise ValueError(f"Expected num_examples >= 0, got {update.num_examples}.")
        return update.num_examples


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor, dtype=torch.float64)


def _accumulate(sums: Tensors, tensors: Tensors, weight: int) -> None:
    """Adds in place; unequal shapes are refused, as torch would broadcast them."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in sums.items()}:
        raise ValueError(
            "Expected all updates with the same names and shapes, got another: all "
            "clients of a round must train the same method."
        )
    for name, tensor in tensors.items():
        sums[name].add_(tensor, alpha=weight)
