"""The contract of the partitioners: who holds which examples."""

from abc import ABC, abstractmethod

import torch

from fedpeft.data.examples import Examples
from fedpeft.errors import ConfigError


class Partitioner(ABC):
    """Deals the training examples to simulated clients.

    Variants are frozen dataclasses whose fields are keys of ``[partition]``. They see
    one example a person where persons are known: ``fedpeft.data.partition`` picks it,
    and hands over the person's other rows with it.
    """

    @abstractmethod
    def partition(
        self, examples: Examples, num_clients: int, rng: torch.Generator
    ) -> list[list[int]]:
        """Returns each client's indices, ascending.

        **Guarantees**: every index is in exactly one client; no client is empty; the
        same examples and the same state of `rng` give the same result.

        Raises:
            ConfigError: if there are too few examples, persons or groups for so many
                clients.
        """


def check_num_clients(num_clients: int, most: int, what: str) -> None:
    """Refuses to deal `most` things to more clients.

    Args:
        num_clients: how many clients are asked for.
        most: how many can be served.
        what: what `most` counts, for the message.

    Raises:
        ConfigError: if some client would stay empty.
    """
    if not 1 <= num_clients <= most:
        raise ConfigError(
            f"[partition] num_clients: expected 1 to {most}, since the training split "
            f"has {what}, got {num_clients}; change it or bring more data."
        )


def check_one_label(examples: Examples, name: str) -> None:
    """Refuses examples of several labels each, which cannot be dealt by label.

    Raises:
        ConfigError: names the partitioner, and another.
    """
    if examples.is_multi_label:
        raise ConfigError(
            f"[partition] name: {name} deals by label, but an example may have several "
            "here; choose iid or by-group."
        )
