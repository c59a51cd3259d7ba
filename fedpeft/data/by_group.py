"""The natural split: a group (a site, a film, an author) lies whole with one client."""

import heapq
from dataclasses import dataclass

import torch

from fedpeft.data.examples import Examples
from fedpeft.data.partitioner import Partitioner, check_num_clients
from fedpeft.errors import ConfigError


@dataclass(frozen=True)
class ByGroup(Partitioner):
    """Deals whole groups, largest first, to the client with fewest examples so far.

    Groups of equal size come in random order, so which groups meet at a client depends
    on `rng`.

    **Guarantees**: no group is split; two clients' sizes differ by at most the size of
    the largest group.
    """

    def partition(
        self, examples: Examples, num_clients: int, rng: torch.Generator
    ) -> list[list[int]]:
        """See :meth:`Partitioner.partition`.

        Raises:
            ConfigError: also if the examples have no groups.
        """
        if examples.groups is None:
            raise ConfigError(
                "[partition] name: by-group expects data with groups, got none; name "
                "the column that holds them by [data] group."
            )
        groups = list(examples.indices_by_group().values())
        check_num_clients(num_clients, len(groups), f"{len(groups)} groups")
        shuffled = [groups[i] for i in torch.randperm(len(groups), generator=rng)]
        clients: list[list[int]] = [[] for _ in range(num_clients)]
        smallest = [(0, client) for client in range(num_clients)]
        for group in sorted(shuffled, key=len, reverse=True):
            size, client = heapq.heappop(smallest)
            clients[client].extend(group)
            heapq.heappush(smallest, (size + len(group), client))
        return [sorted(client) for client in clients]
