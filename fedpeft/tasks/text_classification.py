"""Which class, or classes, a text belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fedpeft.backbone import Backbone
from fedpeft.data import Batch, Encoded, Examples, person_numbers
from fedpeft.errors import ConfigError
from fedpeft.sections import DataSection
from fedpeft.tasks.classes import Classification, main_metric
from fedpeft.tasks.module import TaskModule
from fedpeft.tasks.task import contents_of


class TextClassifier(TaskModule):
    """Backbone, mean over the tokens that are not padding, linear head."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps ids and mask ``(batch, tokens)`` to logits ``(batch, labels)``."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        assert self.head is not None
        logits: torch.Tensor = self.head(self.features(inputs, kept))
        return logits

    def pool(
        self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Returns the mean over tokens, shape ``(batch, features)``."""
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class TextClassification(Classification):
    """A text in, a class out.

    Attributes:
        tokenizer: of the backbone.
        max_length: tokens of a text; the rest is cut off.
        metric: see :func:`main_metric`.
    """

    tokenizer: Any
    max_length: int
    metric: str = "accuracy"

    @classmethod
    def of(cls, backbone: Backbone, data: DataSection) -> "TextClassification":
        """Wants a tokenizer."""
        if backbone.tokenizer is None:
            raise ConfigError(
                f"[model] task: expected a backbone for texts, got {backbone.name!r}, "
                "which has no tokenizer."
            )
        return cls(backbone.tokenizer, data.max_length, main_metric(data))

    def build(self, backbone: Backbone, num_labels: int) -> TextClassifier:
        """Puts a linear head behind the mean over tokens."""
        return TextClassifier(backbone.module, backbone.hidden_size, num_labels)

    def encode(self, examples: Examples) -> Encoded:
        """Tokenises all texts in one call: at most `max_length` tokens, no padding."""
        texts = contents_of(examples, str, task="text-classification")
        persons = person_numbers(examples.persons)
        if not texts:
            return Encoded([], examples.labels, persons)
        encoding = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        inputs = [torch.tensor(ids) for ids in encoding["input_ids"]]
        return Encoded(inputs, examples.labels, persons)

    def collate(self, encoded: Encoded, indices: Sequence[int]) -> Batch:
        """Pads to the longest."""
        chosen = encoded.subset(indices)
        return Batch(padded(chosen.inputs, self.tokenizer.pad_token_id), chosen.labels)


def padded(
    sequences: list[torch.Tensor], pad_token_id: int | None
) -> dict[str, torch.Tensor]:
    """Returns ids and mask, padded at the end to the longest of them.

    A tokenizer without a token for padding needs none: what stands there is masked.

    Raises:
        ValueError: if there are no sequences.
    """
    if not sequences:
        raise ValueError("Expected at least one example to collate, got none.")
    lengths = torch.tensor([len(ids) for ids in sequences])
    ids = pad_sequence(sequences, batch_first=True, padding_value=pad_token_id or 0)
    # From the lengths: a pad token that stands in the text itself stays visible.
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
