"""Label skew with one knob: a Dirichlet draw shares out each label's examples."""

from dataclasses import dataclass

import numpy as np
import torch

from fedpeft.data.examples import Examples
from fedpeft.data.partitioner import (
    Partitioner,
    check_num_clients,
    check_one_label,
)
from fedpeft.data.persons import noun


@dataclass(frozen=True)
class Dirichlet(Partitioner):
    """Draws, for each label, what share of its examples each client gets.

    Sizes and label mixtures both vary. A client that would stay empty gets one example
    of the client that holds most, so there the result is not exactly Dirichlet.

    Attributes:
        dirichlet_alpha: concentration. Large: every client gets an equal share (1000 is
            close to iid); 0.1: most of a label lies with a few clients.

    Raises:
        ValueError: unless 1e-3 <= dirichlet_alpha <= 1e6.

    Source: Yurochkin et al. (2019), https://arxiv.org/abs/1905.12022, section 4.
    """

    dirichlet_alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 1e-3 <= self.dirichlet_alpha <= 1e6:
            raise ValueError(
                f"expected 0.001 <= dirichlet_alpha <= 1e6, got {self.dirichlet_alpha}"
            )

    def partition(
        self, examples: Examples, num_clients: int, rng: torch.Generator
    ) -> list[list[int]]:
        """See :meth:`Partitioner.partition`."""
        check_num_clients(
            num_clients, len(examples), f"{len(examples)} {noun(examples)}"
        )
        check_one_label(examples, "dirichlet")
        # torch's Dirichlet takes no generator; NumPy's is seeded from ours.
        draw = np.random.default_rng(
            int(torch.randint(2**63 - 1, (), generator=rng).item())
        )
        clients: list[list[int]] = [[] for _ in range(num_clients)]
        for label in range(len(examples.label_names)):
            indices = torch.nonzero(examples.labels == label).flatten().numpy()
            shares = draw.dirichlet(np.full(num_clients, self.dirichlet_alpha))
            ends = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
            parts = np.split(draw.permutation(indices), ends)
            for client, part in zip(clients, parts, strict=True):
                client.extend(part.tolist())
        for client in clients:
            if not client:
                client.append(max(clients, key=len).pop())
        return [sorted(client) for client in clients]
