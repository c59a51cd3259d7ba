"""The classical pathological split: each client sees a few labels only."""

from dataclasses import dataclass

import torch

from fedpeft.data.examples import Examples
from fedpeft.data.partitioner import (
    Partitioner,
    check_num_clients,
    check_one_label,
)
from fedpeft.data.persons import noun


@dataclass(frozen=True)
class Shards(Partitioner):
    """Sorts by label, cuts into equal shards and gives each client a few at random.

    **Guarantees**: shards differ by at most one example, clients by at most
    `shards_per_client`. With balanced labels a client holds about `shards_per_client`
    labels at most; a shard that straddles a border holds one more.

    Attributes:
        shards_per_client: how many shards each client gets.

    Raises:
        ValueError: unless shards_per_client >= 1.

    Source: McMahan et al. (2017), https://arxiv.org/abs/1602.05629, section 3. There,
    ties keep the file's order; here they are shuffled.
    """

    shards_per_client: int = 2

    def __post_init__(self) -> None:
        if self.shards_per_client < 1:
            raise ValueError(
                f"expected shards_per_client >= 1, got {self.shards_per_client}"
            )

    def partition(
        self, examples: Examples, num_clients: int, rng: torch.Generator
    ) -> list[list[int]]:
        """See :meth:`Partitioner.partition`."""
        check_num_clients(
            num_clients,
            len(examples) // self.shards_per_client,
            f"{len(examples)} {noun(examples)} for {self.shards_per_client} shards a "
            "client",
        )
        check_one_label(examples, "shards")
        shuffled = torch.randperm(len(examples), generator=rng)
        order = shuffled[torch.argsort(examples.labels[shuffled], stable=True)]
        num_shards = num_clients * self.shards_per_client
        shards = [shard.tolist() for shard in torch.tensor_split(order, num_shards)]
        dealt = torch.randperm(num_shards, generator=rng).view(num_clients, -1).tolist()
        return [
            sorted(index for shard in hand for index in shards[shard]) for hand in dealt
        ]
