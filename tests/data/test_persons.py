"""No person is torn: not between splits, not between clients."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data import PARTITIONERS, Examples, partition, split
from fedpeft.errors import ConfigError, DataError
from fedpeft.sections import DataSection, PartitionSection


def make(
    persons: list[str], groups: list[str] | None = None, labels: list[int] | None = None
) -> Examples:
    """Texts are the examples' numbers."""
    return Examples(
        contents=tuple(str(i) for i in range(len(persons))),
        labels=torch.tensor(labels or [0] * len(persons)),
        groups=tuple(groups) if groups is not None else None,
        label_names=("a", "b", "c"),
        persons=tuple(persons),
    )


def data_section(test: float, validation: float = 0.0) -> DataSection:
    return DataSection(
        name="any",
        nominal_examples=1,
        test_fraction=test,
        validation_fraction=validation,
    )


def holders(examples: Examples, clients: list[list[int]]) -> list[set[str]]:
    """Returns the persons each client holds."""
    assert examples.persons is not None
    return [{examples.persons[i] for i in client} for client in clients]


@st.composite
def tasks(draw: st.DrawFn) -> Examples:
    """Draws 20 to 31 persons of any number of rows, in 10 groups, some in several."""
    first = draw(st.permutations([(f"p{i}", f"g{i % 10}") for i in range(20)]))
    row = st.tuples(st.integers(0, 30), st.integers(0, 9))
    more = draw(st.lists(row, max_size=60))
    rows = [*first, *((f"p{person}", f"g{group}") for person, group in more)]
    label = st.integers(0, 2)
    labels = draw(st.lists(label, min_size=len(rows), max_size=len(rows)))
    persons, groups = (list(names) for names in zip(*rows, strict=True))
    return make(persons, groups, labels)


@given(examples=tasks(), with_groups=st.booleans(), test=st.floats(0.3, 0.5))
def test_no_person_is_in_two_splits(
    examples: Examples, with_groups: bool, test: float
) -> None:
    if not with_groups:
        examples = dataclasses.replace(examples, groups=None)
    section = data_section(test, 0.2)
    splits = split(examples, section)
    parts = [splits.train, splits.validation, splits.test]
    texts = [text for part in parts for text in part.contents]
    assert sorted(texts, key=int) == list(examples.contents)
    owned = [set(part.persons or ()) for part in parts]
    assert sum(map(len, owned)) == len(set(examples.persons or ()))
    assert split(examples, section).test.contents == splits.test.contents


@pytest.mark.parametrize("name", PARTITIONERS)
@given(examples=tasks(), num_clients=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_no_person_is_at_two_clients(
    name: str, examples: Examples, num_clients: int, seed: int
) -> None:
    section = PartitionSection(name=name, num_clients=num_clients, seed=seed)
    clients = partition(examples, section)
    assert len(clients) == num_clients
    assert all(client == sorted(client) != [] for client in clients)
    assert sorted(i for client in clients for i in client) == [*range(len(examples))]
    owned = holders(examples, clients)
    assert sum(map(len, owned)) == len(set(examples.persons or ()))
    assert clients == partition(examples, section)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_persons_of_one_row_are_dealt_like_examples(name: str) -> None:
    groups = [f"g{i // 3}" for i in range(60)]
    persons = make([f"p{i}" for i in range(60)], groups, [0, 1, 2] * 20)
    examples = dataclasses.replace(persons, persons=None)
    section = PartitionSection(name=name, num_clients=4)
    assert partition(persons, section) == partition(examples, section)
    sections = data_section(0.2)
    assert (
        split(persons, sections).test.contents
        == split(examples, sections).test.contents
    )


def test_clients_and_fractions_count_persons() -> None:
    examples = make([*"a" * 91, *"bcdefghij"])
    clients = partition(examples, PartitionSection(name="iid", num_clients=5))
    assert [len(persons) for persons in holders(examples, clients)] == [2] * 5
    splits = split(examples, data_section(0.2, 0.3))
    parts = (splits.train, splits.validation, splits.test)
    assert [len(set(part.persons or ())) for part in parts] == [5, 3, 2]


def test_person_of_several_groups_goes_whole_with_the_first() -> None:
    examples = make([*"abcdaa"], groups=["x", "x", "y", "y", "y", "y"])
    clients = partition(examples, PartitionSection(name="by-group", num_clients=2))
    assert sorted(clients) == [[0, 1, 4, 5], [2, 3]]
    splits = split(examples, data_section(0.5))
    assert sorted([splits.train.contents, splits.test.contents]) == [
        ("0", "1", "4", "5"),
        ("2", "3"),
    ]


def test_person_of_several_labels_counts_with_the_first() -> None:
    examples = make([*"aabb"], labels=[0, 1, 1, 0])
    section = PartitionSection.model_validate(
        {"name": "shards", "num_clients": 2, "shards_per_client": 1}
    )
    assert sorted(partition(examples, section)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_too_few_persons_are_refused_by_their_number(name: str) -> None:
    with pytest.raises(ConfigError, match="the training split has 2 persons"):
        partition(make([*"aabbbb"]), PartitionSection(name=name, num_clients=3))
    with pytest.raises(DataError, match=r"got none of 2 persons.* bring more persons"):
        split(make([*"aabbbb"]), data_section(0.1))
