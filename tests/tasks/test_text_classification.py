"""From texts to padded batches."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from fedpeft.data import Encoded, Examples
from fedpeft.tasks import TextClassification


def make(*lengths: int) -> Encoded:
    inputs = [torch.full((length,), i + 1) for i, length in enumerate(lengths)]
    return Encoded(inputs, torch.arange(len(lengths)))


def task(pad_token_id: int | None) -> TextClassification:
    return TextClassification(SimpleNamespace(pad_token_id=pad_token_id), 64)


def test_collate_pads_to_the_longest_of_the_batch() -> None:
    batch = task(7).collate(make(1, 9, 3), [2, 0])
    assert batch.inputs["input_ids"].tolist() == [[3, 3, 3], [1, 7, 7]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [2, 0]
    assert {t.dtype for t in (*batch.inputs.values(), batch.labels)} == {torch.int64}


def test_pad_token_within_a_text_is_not_masked() -> None:
    batch = task(2).collate(make(1, 2), [0, 1])
    assert batch.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_batch_moves_as_a_whole() -> None:
    moved = task(0).collate(make(1), [0]).to("meta")
    assert {t.device.type for t in (*moved.inputs.values(), moved.labels)} == {"meta"}


def test_nothing_to_collate_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        task(0).collate(make(1), [])


def test_a_tokenizer_without_padding_needs_none() -> None:
    batch = task(None).collate(make(1, 2), [0, 1])
    assert batch.inputs["input_ids"].tolist() == [[1, 0], [2, 2]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_real_tokenizer_cuts_and_does_not_pad(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    assert tokenizer.is_fast
    classification = TextClassification(tokenizer, max_length=16)
    examples = Examples(
        contents=("A film.", "good " * 50),
        labels=torch.tensor([1, 0]),
        groups=None,
        label_names=("rotten", "fresh"),
        persons=("zoe", "ada"),
    )
    encoded = classification.encode(examples)
    assert len(encoded) == 2
    assert encoded.inputs[0].tolist() == [101, 1037, 2143, 1012, 102]
    assert len(encoded.inputs[1]) == 16
    assert encoded.subset([1]).labels.tolist() == [0]
    assert encoded.persons is not None
    assert encoded.persons.tolist() == [0, 1]
    nothing = classification.encode(examples.subset([]))
    assert len(nothing) == 0
    assert nothing.units(by_person=True) == []
    unknown = dataclasses.replace(examples, persons=None)
    assert classification.encode(unknown).persons is None
