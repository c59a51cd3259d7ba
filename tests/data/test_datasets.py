"""Data sets by name, and what every data set is."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from fedpeft.data import Examples, load, partition, split
from fedpeft.errors import AssetError, ConfigError
from fedpeft.sections import DataSection, PartitionSection


def section(**keys: object) -> DataSection:
    return DataSection.model_validate(
        {"name": "rotten-tomatoes", "nominal_examples": 512, **keys}
    )


def test_rotten_tomatoes_is_complete(rotten_tomatoes: Path) -> None:
    assert rotten_tomatoes.exists()
    examples = load(section(labels=("rotten", "fresh")))
    assert len(examples) == 12_808
    assert examples.label_names == ("rotten", "fresh")
    assert torch.bincount(examples.labels).tolist() == [5_405, 7_403]
    assert len(set(examples.groups or ())) == 508
    assert all(text.strip() for text in examples.contents)


def test_rotten_tomatoes_splits_and_partitions_by_film(rotten_tomatoes: Path) -> None:
    assert rotten_tomatoes.exists()
    examples = load(section())
    splits = split(examples, section(validation_fraction=0.1))
    assert abs(len(splits.test) - 0.16 * len(examples)) <= 10
    assert abs(len(splits.validation) - 0.1 * len(examples)) <= 10
    assert not set(splits.test.groups or ()) & set(splits.train.groups or ())
    clients = partition(splits.train, PartitionSection(name="by-group", num_clients=20))
    sizes = Counter(len(client) for client in clients)
    assert max(sizes) - min(sizes) <= 35


def test_data_set_that_was_not_pulled_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match="run `fedpeft assets pull rotten-tomatoes`"):
        load(section())


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rotten-tomatoes'"):
        load(section(name="rotten-tomatos"))
    with pytest.raises(ConfigError, match=r"'imdb' \(known: emoji, .*\)\. A"):
        load(section(name="imdb"))


def test_labels_of_a_known_data_set_cannot_be_redefined(rotten_tomatoes: Path) -> None:
    assert rotten_tomatoes.exists()
    with pytest.raises(ConfigError, match="expected rotten, fresh for"):
        load(section(labels=("fresh", "rotten")))


def test_persons_are_asked_of_a_data_set_that_knows_none(rotten_tomatoes: Path) -> None:
    assert rotten_tomatoes.exists()
    with pytest.raises(ConfigError, match=r"\[data\] person: .* does not say whose"):
        load(section(person="critic"))


@pytest.mark.parametrize(
    "key", ["text", "label", "group", "prompt", "completion", "label_separator"]
)
def test_columns_of_a_known_data_set_cannot_be_set(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[data\] {key}: describes a file"):
        load(section(**{key: "other"}))


def test_a_known_data_set_has_no_unreadable_images() -> None:
    with pytest.raises(ConfigError, match=r"unreadable: describes a folder of images"):
        load(section(unreadable="skip"))


def make() -> Examples:
    return Examples(
        contents=("a", "b", "c"),
        labels=torch.tensor([0, 1, 0]),
        groups=("x", "y", "x"),
        label_names=("n", "p"),
        persons=("ada", "bob", "bob"),
    )


def test_subset_keeps_the_order_asked_for() -> None:
    part = make().subset([2, 1])
    assert part.contents == ("c", "b")
    assert part.labels.tolist() == [0, 1]
    assert part.groups == ("x", "y")
    assert part.persons == ("bob", "bob")
    nothing = make().subset([])
    assert len(nothing) == 0
    assert nothing.persons == ()


def test_groups_are_listed_by_name_with_their_indices() -> None:
    assert make().indices_by_group() == {"x": [0, 2], "y": [1]}


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        (torch.tensor([0, 1]), None),
        (torch.tensor([0.0, 1.0, 0.0]), None),
        (torch.tensor([0, 1, 2]), None),
        (torch.tensor([0, 1, -1]), None),
        (torch.tensor([0, 1, 0]), ("x",)),
    ],
)
def test_parts_that_disagree_are_refused(
    labels: torch.Tensor, groups: tuple[str, ...] | None
) -> None:
    with pytest.raises(ValueError, match="Expected"):
        Examples(("a", "b", "c"), labels, groups, ("n", "p"))


def test_persons_that_disagree_with_the_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected 3 persons, one an example, got 2"):
        dataclasses.replace(make(), persons=("ada", "bob"))


def test_examples_without_groups_have_no_groups_to_list() -> None:
    examples = Examples(("a",), torch.tensor([0]), None, ("n", "p"))
    assert examples.subset([0]).groups is None
    assert examples.subset([0]).persons is None
    with pytest.raises(ValueError, match="with groups, got none"):
        examples.indices_by_group()
