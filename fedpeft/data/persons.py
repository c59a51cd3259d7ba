"""A person's rows stay together: persons are dealt, and all of their rows follow."""

from collections.abc import Iterable

from fedpeft.data.examples import Examples, indices_by


def rows_by_person(examples: Examples) -> list[list[int]]:
    """Returns each person's indices, ascending; persons as they appear.

    Where it is not known whose the examples are, each is taken for a person of its own.
    """
    if examples.persons is None:
        return [[index] for index in range(len(examples))]
    return list(indices_by(examples.persons).values())


def one_each(examples: Examples, rows: Iterable[list[int]]) -> Examples:
    """Returns one example a person, the first, which stands for all of that person's.

    Its label and its group are taken for the person's.

    Args:
        examples: all of them.
        rows: what :func:`rows_by_person` gives.
    """
    return examples.subset([indices[0] for indices in rows])


def all_rows(rows: list[list[int]], persons: Iterable[int]) -> list[int]:
    """Returns the indices of all examples of the chosen persons, ascending.

    >>> all_rows([[0, 3], [1], [2, 4]], [2, 0])
    [0, 2, 3, 4]
    """
    return sorted(index for person in persons for index in rows[person])


def noun(examples: Examples) -> str:
    """Says what one example of each stands for: ``persons``, or ``examples``."""
    return "examples" if examples.persons is None else "persons"
