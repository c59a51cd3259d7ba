"""From encoded examples to batches, with as little padding as can be."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedpeft.data.examples import indices_by


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples as a task's model takes them, not yet padded.

    Attributes:
        inputs: token ids of each example, of shape ``(length,)``, int64; or its pixels,
            uint8 of shape ``(height, width)`` or ``(height, width, 3)``.
        labels: what the task learns, one row an example, int64.
        persons: a number for whose record each example is, shape ``(num_examples,)``,
            int64; or None if that is not known.
    """

    inputs: list[torch.Tensor]
    labels: torch.Tensor
    persons: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, indices: Sequence[int]) -> "Encoded":
        """Returns the examples at `indices`, in that order."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        return Encoded(
            inputs=[self.inputs[i] for i in indices],
            labels=self.labels[chosen],
            persons=None if self.persons is None else self.persons[chosen],
        )

    def joined(self, others: "Encoded") -> "Encoded":
        """Returns these examples and then `others`; whose they are is left out."""
        labels = torch.cat([self.labels, others.labels])
        return Encoded([*self.inputs, *others.inputs], labels)

    def units(self, by_person: bool) -> list[list[int]]:
        """Returns the units of privacy, each as the indices of its examples, ascending.

        Args:
            by_person: whether one person's examples are one unit, in order of first
                appearance; else every example is one of its own.

        Raises:
            ValueError: if it is not known whose the examples are.
        """
        if not by_person:
            return [[index] for index in range(len(self))]
        if self.persons is None:
            raise ValueError(
                "Expected examples of known persons, got none; name the column that "
                "says whose a row is by [data] person."
            )
        return list(indices_by(self.persons.tolist()).values())


@dataclass(frozen=True, eq=False)
class Batch:
    """What goes through the model at once.

    Attributes:
        inputs: what the backbone's ``forward`` takes, by name, the examples first.
        labels: what the task learns, the examples first.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch on `device`."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device))


def person_numbers(names: Sequence[str] | None) -> torch.Tensor | None:
    """Returns one number a name, from 0 as they appear, shape ``(len(names),)``."""
    if names is None:
        return None
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


def physical_batches(
    encoded: Encoded, batch: Sequence[list[int]], max_size: int
) -> list[list[list[int]]]:
    """Cuts one logical batch into chunks of units of similar length.

    **Guarantees**: every unit is in exactly one chunk, whole; no chunk is empty or
    holds more than `max_size` examples; no units, no chunk; equal lengths keep their
    order. The longest come first, so that a batch too large for the memory fails at
    once.

    >>> encoded = Encoded([torch.ones(n) for n in (2, 9, 2, 8)], torch.zeros(4))
    >>> physical_batches(encoded, [[0], [1], [2], [3]], max_size=2)
    [[[1], [3]], [[0], [2]]]
    >>> physical_batches(encoded, [[0], [2, 1], [3]], max_size=2)
    [[[2, 1]], [[3], [0]]]

    Args:
        encoded: the examples.
        batch: units of privacy, each as the indices of its examples; a unit is as long
            as its longest example.
        max_size: the most examples that pass through the model at once.

    Raises:
        ValueError: unless max_size >= 1 and every unit has 1 to `max_size` examples.
    """
    if max_size < 1:
        raise ValueError(f"Expected max_size >= 1, got {max_size}.")
    for unit in batch:
        if not 1 <= len(unit) <= max_size:
            raise ValueError(
                f"Expected units of 1 to {max_size} examples, got one of {len(unit)}: "
                "leave out what is empty, draw fewer examples of each person."
            )
    chunks: list[list[list[int]]] = []
    room = 0
    for unit in sorted(batch, key=lambda unit: -_length(encoded, unit)):
        if len(unit) > room:
            chunks.append([])
            room = max_size
        chunks[-1].append(unit)
        room -= len(unit)
    return chunks


def _length(encoded: Encoded, unit: list[int]) -> int:
    return max(len(encoded.inputs[index]) for index in unit)
