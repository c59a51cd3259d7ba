"""From texts to padded batches, with as little padding as can be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from fedpeft.data.examples import TextExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised examples, not padded.

    Attributes:
        input_ids: token ids of each example, each of shape ``(length,)``, int64.
        labels: shape ``(num_examples,)``, int64.
    """

    input_ids: list[torch.Tensor]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def subset(self, indices: Sequence[int]) -> "Encoded":
        """Returns the examples at `indices`, in that order."""
        return Encoded(
            input_ids=[self.input_ids[i] for i in indices],
            labels=self.labels[torch.tensor(indices, dtype=torch.int64)],
        )


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
    if not len(examples):
        return Encoded([], examples.labels)
    encoding = tokenizer(
        list(examples.texts),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    input_ids = [torch.tensor(ids) for ids in encoding["input_ids"]]
    return Encoded(input_ids, examples.labels)


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
    encoded: Encoded, indices: Sequence[int], max_size: int
) -> list[list[int]]:
    """Cuts one logical batch into chunks of examples of similar length.

    **Guarantees**: every index is in exactly one chunk; no chunk is empty or larger
    than `max_size`; no indices, no chunk; equal lengths keep their order. The longest
    come first, so that a batch too large for the memory fails at once.

    >>> encoded = Encoded([torch.ones(n) for n in (2, 9, 2, 8)], torch.zeros(4))
    >>> physical_batches(encoded, [0, 1, 2, 3], max_size=2)
    [[1, 3], [0, 2]]

    Raises:
        ValueError: unless max_size >= 1.
    """
    if max_size < 1:
        raise ValueError(f"Expected max_size >= 1, got {max_size}.")
    order = sorted(indices, key=lambda index: -len(encoded.input_ids[index]))
    return [order[i : i + max_size] for i in range(0, len(order), max_size)]
