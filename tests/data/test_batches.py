from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data import Encoded, physical_batches


def make(*lengths: int, persons: list[int] | None = None) -> Encoded:
    """Example i has the token i + 1, `length` times, and the label i."""
    inputs = [torch.full((length,), i + 1) for i, length in enumerate(lengths)]
    numbers = None if persons is None else torch.tensor(persons)
    return Encoded(inputs, torch.arange(len(lengths)), numbers)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Encoded, list[list[int]], int]:
    """Draws examples, units of some of them in any order, and what fits a chunk."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=40))
    max_size = draw(st.integers(1, 12))
    rest = draw(st.permutations(range(len(lengths))))
    units: list[list[int]] = []
    while draw(st.booleans()) and rest:
        size = draw(st.integers(1, min(max_size, len(rest))))
        units.append(rest[:size])
        rest = rest[size:]
    return make(*lengths), units, max_size


def test_units_are_examples_or_persons_as_they_appear() -> None:
    encoded = make(1, 1, 1, 1, persons=[7, 3, 7, 5])
    assert encoded.units(by_person=False) == [[0], [1], [2], [3]]
    assert encoded.units(by_person=True) == [[0, 2], [1], [3]]
    assert encoded.subset([3, 2, 0]).units(by_person=True) == [[0], [1, 2]]
    assert encoded.subset([]).units(by_person=True) == []


def test_examples_of_unknown_persons_are_no_units_of_persons() -> None:
    assert make(1, 1).subset([1]).persons is None
    with pytest.raises(ValueError, match="known persons, got none"):
        make(1, 1).units(by_person=True)


@given(batch=batches())
def test_chunks_hold_every_unit_once_and_whole_from_long_to_short(
    batch: tuple[Encoded, list[list[int]], int],
) -> None:
    encoded, units, max_size = batch
    chunks = physical_batches(encoded, units, max_size)
    order = [unit for chunk in chunks for unit in chunk]
    longest = [max(len(encoded.inputs[i]) for i in unit) for unit in units]
    expected = sorted(range(len(units)), key=lambda u: (-longest[u], u))
    assert order == [units[u] for u in expected]
    assert all(1 <= sum(map(len, chunk)) <= max_size for chunk in chunks)
    for chunk, following in pairwise(chunks):
        assert sum(map(len, chunk)) + len(following[0]) > max_size


@given(lengths=st.lists(st.integers(1, 9), max_size=40), max_size=st.integers(1, 12))
def test_single_examples_fill_every_chunk_but_the_last(
    lengths: list[int], max_size: int
) -> None:
    encoded = make(*lengths)
    chunks = physical_batches(encoded, encoded.units(by_person=False), max_size)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    assert [[i for (i,) in chunk] for chunk in chunks] == [
        order[i : i + max_size] for i in range(0, len(order), max_size)
    ]


def test_an_empty_poisson_batch_has_no_chunk() -> None:
    assert physical_batches(make(3, 2), [], max_size=4) == []


def test_chunks_of_no_size_are_refused() -> None:
    with pytest.raises(ValueError, match="max_size >= 1, got 0"):
        physical_batches(make(1), [[0]], max_size=0)


@pytest.mark.parametrize("unit", [[], [0, 1, 2]])
def test_a_unit_that_is_empty_or_fits_no_chunk_is_refused(unit: list[int]) -> None:
    with pytest.raises(ValueError, match=f"1 to 2 examples, got one of {len(unit)}"):
        physical_batches(make(1, 1, 1), [[1], unit], max_size=2)
