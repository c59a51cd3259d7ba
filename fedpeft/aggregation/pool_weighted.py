"""The mean of the updates, entry by entry of a pool weighted by how often it was used.

Which tensors have entries is told by their names: ``pool_...`` at the end is a tensor
whose first dimension counts entries, ``pool_counts`` holds the counts themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fedpeft.interfaces import Aggregator, State, Update
from fedpeft.tensors import Tensors

_ENTRIES, _COUNTS = "pool_", "pool_counts"


@dataclass(frozen=True)
class PoolWeighted(Aggregator):
    """Weights each client's pool entries by its counts; all else is the plain mean.

    The counts are a part of the update: clipped, noised and charged with it wherever
    privacy is claimed. Noise may make them negative, which counts as zero. An entry
    that counts for no client stays as it is.

    **Guarantees**: the stream is consumed once; two fp64 sums and one update are held.
    Without counts it is the mean. There is no robustness: a client that overstates a
    count decides what becomes of that entry.

    Feng et al. (2023), FedIns, take the plain mean of each entry.
    """

    def init(self, like: Tensors) -> State:
        """Returns the empty state: nothing is remembered."""
        del like
        return {}

    def aggregate(
        self, updates: Iterable[Update], state: State
    ) -> tuple[Tensors, State]:
        """Returns the weighted mean, in the dtypes of the first update.

        Raises:
            ValueError: if the stream is empty, or the updates differ in names, shapes
                or the number of entries.
        """
        dtypes: dict[str, torch.dtype] = {}
        sums: Tensors = {}
        weights: Tensors = {}
        for update in updates:
            tensors = update.tensors
            if not dtypes:
                dtypes = {name: t.dtype for name, t in tensors.items()}
                sums = {
                    name: torch.zeros_like(t).double() for name, t in tensors.items()
                }
                weights = {name: torch.zeros(()).double() for name in tensors}
            _check(tensors, sums)
            counts = _counts(tensors)
            for name, tensor in tensors.items():
                weight = _weight(name, tensor, counts)
                sums[name].add_(tensor.double() * weight)
                weights[name] = weights[name] + weight
            # Else they would live on while the stream decodes the next one.
            del update, tensors, tensor
        if not dtypes:
            raise ValueError(
                "Expected at least one update, got none; a round without replies must "
                "not reach the aggregator."
            )
        step = {
            name: torch.where(weights[name] > 0, total / weights[name], 0.0).to(
                dtypes[name]
            )
            for name, total in sums.items()
        }
        return step, state


def _counts(tensors: Tensors) -> torch.Tensor | None:
    found = [t for name, t in tensors.items() if _last(name) == _COUNTS]
    return found[0].double().clamp(min=0) if found else None


def _weight(
    name: str, tensor: torch.Tensor, counts: torch.Tensor | None
) -> torch.Tensor:
    """Returns the weight of each entry, ready to broadcast; one for what has none."""
    has_entries = _last(name).startswith(_ENTRIES) and _last(name) != _COUNTS
    if counts is None or not has_entries:
        return torch.ones(()).double()
    if len(counts) != len(tensor):
        raise ValueError(
            f"Expected {len(counts)} entries in {name}, as many as counts, got "
            f"{len(tensor)}."
        )
    return counts.view(-1, *(1 for _ in tensor.shape[1:]))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _check(tensors: Tensors, sums: Tensors) -> None:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in sums.items()}:
        raise ValueError(
            "Expected all updates with the same names and shapes, got another: all "
            "clients of a round must train the same method."
        )
