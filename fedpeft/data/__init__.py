"""The menu of data sets and partitioners, and the ways to get at them."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch

from fedpeft import seeds
from fedpeft.config import build
from fedpeft.data import (
    emoji,
    fashion_mnist,
    files,
    image_folder,
    mnist,
    review_writing,
    rotten_tomatoes,
)
from fedpeft.data.batches import (
    Batch,
    Encoded,
    person_numbers,
    physical_batches,
)
from fedpeft.data.by_group import ByGroup
from fedpeft.data.dirichlet import Dirichlet
from fedpeft.data.examples import Completion, Content, Examples, digest_of
from fedpeft.data.iid import Iid
from fedpeft.data.images import read_image
from fedpeft.data.kinds import check_keys, kind_of
from fedpeft.data.partitioner import Partitioner
from fedpeft.data.persons import all_rows, one_each, rows_by_person
from fedpeft.data.shards import Shards
from fedpeft.data.splits import Splits, split
from fedpeft.errors import ConfigError, DataError
from fedpeft.sections import DataSection, PartitionSection
from fedpeft.wording import nearest

__all__ = [
    "DATASETS",
    "PARTITIONERS",
    "Batch",
    "Completion",
    "Content",
    "Encoded",
    "Examples",
    "Partitioner",
    "Splits",
    "check_classes",
    "digest_of",
    "load",
    "partition",
    "person_numbers",
    "physical_batches",
    "read_image",
    "split",
]

DATASETS: dict[str, Callable[[], Examples]] = {
    "emoji": emoji.load,
    "fashion-mnist": fashion_mnist.load,
    "mnist": mnist.load,
    "rotten-tomatoes": rotten_tomatoes.load,
    "review-writing": review_writing.load,
}

PARTITIONERS: dict[str, type[Partitioner]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "by-group": ByGroup,
    "shards": Shards,
}


def load(section: DataSection) -> Examples:
    """Reads the data set that ``[data]`` names, or the user's own file.

    Raises:
        ConfigError: for an unknown name, or a key that does not fit it.
        AssetError: if the data set has not been pulled.
        DataError: if the file cannot be read as the section describes it.
    """
    labels = section.labels or ()
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"[data] labels: expected each label once, got {', '.join(labels)}."
        )
    examples = _read(section)
    if section.max_examples is not None:
        return _some(examples, section.max_examples, section.split_seed)
    return examples


def _some(examples: Examples, number: int, seed: int) -> Examples:
    """Draws persons, each whole, until the number of examples is reached."""
    rows = rows_by_person(examples)
    rng = seeds.generator(seed, "max_examples")
    order = torch.randperm(len(rows), generator=rng).tolist()
    before = accumulate((len(rows[person]) for person in order), initial=0)
    drawn = [p for p, count in zip(order, before, strict=False) if count < number]
    return examples.subset(all_rows(rows, drawn))


def check_classes(examples: Examples) -> None:
    """Refuses data of which nothing can be learned, or judged.

    For the data of a whole run: one client may well hold a single class.

    Raises:
        DataError: if there are classes, and all examples are of one.
    """
    has_classes = len(examples.label_names) > 1 and not examples.is_multi_label
    found = set(examples.labels.tolist()) if has_classes else set()
    if len(found) == 1:
        raise DataError(
            f"Expected examples of at least two classes, all {len(examples)} are "
            f"{examples.label_names[found.pop()]!r}: bring examples of the others."
        )


def _read(section: DataSection) -> Examples:
    if section.path is None:
        return _load_by_name(section.name or "", section)
    kind = kind_of(section)
    check_keys(section, kind)
    path = Path(section.path).expanduser()
    if kind == "a folder of images":
        return image_folder.read(path, section.labels or (), section.unreadable)
    return files.read(path, section)


def partition(examples: Examples, section: PartitionSection) -> list[list[int]]:
    """Deals the examples to clients as ``[partition]`` says; indices a client.

    **Guarantees**: every index is in exactly one client, and every person too; no
    client is empty; the same examples and section give the same result.

    Where there are persons, they are what is dealt and counted. A person has the label
    and the group of the first row, so one whose rows lie in several groups goes whole
    with the first.

    Raises:
        ConfigError: for an unknown name or key, or too many clients.
    """
    partitioner = build(PARTITIONERS, section, "partition")
    rng = seeds.generator(section.seed, "partition")
    rows = rows_by_person(examples)
    clients = partitioner.partition(one_each(examples, rows), section.num_clients, rng)
    return [all_rows(rows, persons) for persons in clients]


def _load_by_name(name: str, section: DataSection) -> Examples:
    if name not in DATASETS:
        raise ConfigError(
            f"[data] name: no data set {name!r}{nearest(name, DATASETS)} A file of "
            "yours goes by path."
        )
    check_keys(section, "a data set by name")
    examples = DATASETS[name]()
    if section.labels not in (None, examples.label_names):
        raise ConfigError(
            f"[data] labels: expected {', '.join(examples.label_names)} for {name!r}, "
            f"got {', '.join(section.labels or ())}; correct or remove the key."
        )
    if section.person is not None and examples.persons is None:
        raise ConfigError(
            f"[data] person: {name!r} does not say whose its examples are; remove the "
            "key, or bring a file of yours by path."
        )
    return examples
