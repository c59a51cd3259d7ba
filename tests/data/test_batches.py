from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedpeft.data import Encoded, TextExamples, collate, encode, physical_batches


def make(*lengths: int) -> Encoded:
    """Example i has the token i + 1, `length` times, and the label i."""
    input_ids = [torch.full((length,), i + 1) for i, length in enumerate(lengths)]
    return Encoded(input_ids, torch.arange(len(lengths)))


def test_collate_pads_to_the_longest_of_the_batch() -> None:
    batch = collate(make(1, 9, 3), [2, 0], pad_token_id=7)
    assert batch.input_ids.tolist() == [[3, 3, 3], [1, 7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [2, 0]
    assert {t.dtype for t in vars(batch).values()} == {torch.int64}


def test_pad_token_within_a_text_is_not_masked() -> None:
    batch = collate(make(1, 2), [0, 1], pad_token_id=2)
    assert batch.attention_mask.tolist() == [[1, 0], [1, 1]]


def test_batch_moves_as_a_whole() -> None:
    moved = collate(make(1), [0], pad_token_id=0).to("meta")
    assert {t.device.type for t in vars(moved).values()} == {"meta"}


def test_nothing_to_collate_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        collate(make(1), [], pad_token_id=0)


@given(
    lengths=st.lists(st.integers(1, 9), max_size=40),
    max_size=st.integers(1, 12),
    data=st.data(),
)
def test_chunks_hold_every_index_once_from_long_to_short(
    lengths: list[int], max_size: int, data: st.DataObject
) -> None:
    indices = data.draw(st.permutations(range(len(lengths))))
    chunks = physical_batches(make(*lengths), indices, max_size)
    order = [index for chunk in chunks for index in chunk]
    assert order == sorted(indices, key=lambda i: (-lengths[i], indices.index(i)))
    assert all(len(chunk) == max_size for chunk in chunks[:-1])
    assert all(chunks)


def test_an_empty_poisson_batch_has_no_chunk() -> None:
    assert physical_batches(make(3, 2), [], max_size=4) == []


def test_chunks_of_no_size_are_refused() -> None:
    with pytest.raises(ValueError, match="max_size >= 1, got 0"):
        physical_batches(make(1), [0], max_size=0)


def test_real_tokenizer_cuts_and_does_not_pad(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    assert tokenizer.is_fast
    examples = TextExamples(
        texts=("A film.", "good " * 50),
        labels=torch.tensor([1, 0]),
        groups=None,
        label_names=("rotten", "fresh"),
    )
    encoded = encode(examples, tokenizer, max_length=16)
    assert len(encoded) == 2
    assert encoded.input_ids[0].tolist() == [101, 1037, 2143, 1012, 102]
    assert len(encoded.input_ids[1]) == 16
    assert encoded.subset([1]).labels.tolist() == [0]
    assert len(encode(examples.subset([]), tokenizer, max_length=16)) == 0
