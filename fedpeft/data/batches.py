"""From texts to padded batches, with as little padding as can be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from fedpeft.data.examples import TextExamples, indices_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised examples, not padded.

    Attributes:
        input_ids: token ids of each example, each of shape ``(length,)``, int64.
        labels: shape ``(num_examples,)``, int64.
        persons: a number for whose record each example is, shape ``(num_examples,)``,
            int64; or None if that is not known.
    """

    input_ids: list[torch.Tensor]
    labels: torch.Tensor
    persons: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def subset(self, indices: Sequence[int]) -> "Encoded":
        """Returns the examples at `indices`, in that order."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        return Encoded(
            input_ids=[self.input_ids[i] for i in indices],
            labels=self.labels[chosen],
            persons=None if self.persons is None else self.persons[chosen],
        )

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
        input_ids: shape ``(batch, seq)``, int64, padded at the end.
        attention_mask: shape ``(batch, seq)``, int64; 1 for a token, 0 for padding.
        labels: shape ``(batch,)``, int64.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch on `device`."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
        )


def encode(
    examples: TextExamples, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Encoded:
    """Tokenises all examples in one call: at most `max_length` tokens, no padding."""
    persons = None if examples.persons is None else _numbers(examples.persons)
    if not len(examples):
        return Encoded([], examples.labels, persons)
    encoding = tokenizer(
        list(examples.texts),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    input_ids = [torch.tensor(ids) for ids in encoding["input_ids"]]
    return Encoded(input_ids, examples.labels, persons)


def _numbers(names: Sequence[str]) -> torch.Tensor:
    """Returns one number a name, from 0 as they appear, shape ``(len(names),)``."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


def collate(encoded: Encoded, indices: Sequence[int], pad_token_id: int) -> Batch:
    """Pads the examples at `indices` to the longest of them.

    Raises:
        ValueError: if there are no indices.
    """
    if not indices:
        raise ValueError("Expected at least one example to collate, got none.")
    chosen = encoded.subset(indices)
    lengths = torch.tensor([len(ids) for ids in chosen.input_ids])
    input_ids = pad_sequence(
        chosen.input_ids, batch_first=True, padding_value=pad_token_id
    )
    # From the lengths: a pad token that stands in the text itself stays visible.
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return Batch(input_ids, mask.to(torch.int64), chosen.labels)


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
    return max(len(encoded.input_ids[index]) for index in unit)
