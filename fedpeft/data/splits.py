"""Held-out data: which examples train, which tune, which test."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch

from fedpeft import seeds
from fedpeft.data.examples import Examples
from fedpeft.data.persons import all_rows, noun, one_each, rows_by_person
from fedpeft.errors import DataError
from fedpeft.sections import DataSection


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of the examples.

    Attributes:
        train: what the clients share out among them.
        validation: for tuning; empty if its fraction is 0.
        test: for the figure that is reported.
    """

    train: Examples
    validation: Examples
    test: Examples


def split(examples: Examples, section: DataSection) -> Splits:
    """Splits by group where there are groups, else by person, else by example.

    **Guarantees**: every example is in exactly one split, and every person too; every
    group too, unless persons lie in several: such a person goes whole with the group of
    the first row, so that training and test share no person. The same `split_seed`
    gives the same split, whatever the seed of the run; the test split does not depend
    on the validation fraction, so tuning never touches it.

    Fractions are of persons, where there are persons, else of examples. Groups come in
    random order, and each is taken if it brings the split nearer to its fraction.

    Raises:
        DataError: if a split that should have examples would have none.
    """
    rows = rows_by_person(examples)
    persons = one_each(examples, rows)
    if persons.groups is None:
        units = [[index] for index in range(len(persons))]
    else:
        units = list(persons.indices_by_group().values())
    order = torch.randperm(
        len(units), generator=seeds.generator(section.split_seed, "split")
    )
    rest = [units[i] for i in order]
    test, rest = _take(rest, section.test_fraction * len(persons))
    validation, rest = _take(rest, section.validation_fraction * len(persons))
    train_fraction = 1 - section.test_fraction - section.validation_fraction
    for name, part, fraction in (
        ("test", test, section.test_fraction),
        ("validation", validation, section.validation_fraction),
        ("train", rest, train_fraction),
    ):
        if fraction > 0 and not part:
            kind = noun(examples) if persons.groups is None else "groups"
            raise DataError(
                f"Expected a share of {fraction:.3g} for the {name} split, got none of "
                f"{len(units)} {kind}, none of which is divided; bring more {kind} or "
                "change the fractions in [data]."
            )

    def gather(part: list[list[int]]) -> Examples:
        return examples.subset(all_rows(rows, chain.from_iterable(part)))

    return Splits(train=gather(rest), validation=gather(validation), test=gather(test))


def _take(
    units: Iterable[list[int]], size: float
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns units of about `size` together, and all the others."""
    taken, others, total = [], [], 0
    for unit in units:
        if abs(total + len(unit) - size) < abs(total - size):
            taken.append(unit)
            total += len(unit)
        else:
            others.append(unit)
    return taken, others
