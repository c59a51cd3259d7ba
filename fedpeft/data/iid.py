"""The easy case: every client holds a random share of all examples."""

from dataclasses import dataclass

import torch

from fedpeft.data.examples import Examples
from fedpeft.data.partitioner import Partitioner, check_num_clients
from fedpeft.data.persons import noun


@dataclass(frozen=True)
class Iid(Partitioner):
    """Shuffles the examples and deals them in turn.

    **Guarantees**: the clients' sizes differ by at most one.
    """

    def partition(
        self, examples: Examples, num_clients: int, rng: torch.Generator
    ) -> list[list[int]]:
        """See :meth:`Partitioner.partition`."""
        check_num_clients(
            num_clients, len(examples), f"{len(examples)} {noun(examples)}"
        )
        order = torch.randperm(len(examples), generator=rng).tolist()
        return [sorted(order[client::num_clients]) for client in range(num_clients)]
