import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data import Examples, Splits, split
from fedpeft.errors import DataError
from fedpeft.sections import DataSection


def make(groups: list[str] | None, num_examples: int) -> Examples:
    return Examples(
        contents=tuple(str(i) for i in range(num_examples)),
        labels=torch.zeros(num_examples, dtype=torch.int64),
        groups=tuple(groups) if groups is not None else None,
        label_names=("a", "b"),
    )


def section(test: float, validation: float = 0.0, seed: int = 0) -> DataSection:
    return DataSection(
        name="any",
        nominal_examples=1,
        test_fraction=test,
        validation_fraction=validation,
        split_seed=seed,
    )


def parts(splits: Splits) -> list[Examples]:
    return [splits.train, splits.validation, splits.test]


def test_without_groups_fractions_are_exact() -> None:
    splits = split(make(None, 100), section(0.16, 0.1))
    assert [len(part) for part in parts(splits)] == [74, 10, 16]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=30, max_size=60),
    test=st.floats(0.1, 0.4),
    validation=st.floats(0.1, 0.4),
    seed=st.integers(0, 1000),
)
def test_each_group_lies_in_one_split_of_about_the_size_asked(
    sizes: list[int], test: float, validation: float, seed: int
) -> None:
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    examples = make(groups, len(groups))
    splits = split(examples, section(test, validation, seed))
    texts = [text for part in parts(splits) for text in part.contents]
    assert sorted(texts, key=int) == list(examples.contents)
    owned = [set(part.groups or ()) for part in parts(splits)]
    assert sum(map(len, owned)) == len(sizes)
    for part, fraction in ((splits.test, test), (splits.validation, validation)):
        assert abs(len(part) - fraction * len(examples)) <= max(sizes) / 2


def test_split_depends_on_its_seed_alone() -> None:
    examples = make(None, 50)
    first = split(examples, section(0.2))
    assert first.test.contents == split(examples, section(0.2)).test.contents
    assert first.test.contents != split(examples, section(0.2, seed=1)).test.contents


def test_validation_takes_nothing_from_test() -> None:
    examples = make([f"g{i // 3}" for i in range(60)], 60)
    plain, tuned = (split(examples, section(0.2, share)) for share in (0.0, 0.3))
    assert plain.test.contents == tuned.test.contents
    assert len(plain.validation) == 0


def test_order_of_the_rows_does_not_move_a_group() -> None:
    groups = [f"g{i // 3}" for i in range(60)]
    one = split(make(groups, 60), section(0.2))
    other = split(make(groups[::-1], 60), section(0.2))
    assert set(one.test.groups or ()) == set(other.test.groups or ())


@pytest.mark.parametrize(
    ("groups", "fractions", "name"),
    [
        ([*"aaaaabbbbb"], (0.16, 0.0), "test"),
        ([*"aaaaabbbbb"], (0.5, 0.1), "validation"),
        ([*"aaaaabbbbb"], (0.45, 0.45), "train"),
        (None, (0.01, 0.0), "test"),
    ],
)
def test_split_that_would_be_empty_is_refused(
    groups: list[str] | None, fractions: tuple[float, float], name: str
) -> None:
    with pytest.raises(DataError, match=f"for the {name} split, got none"):
        split(make(groups, 10), section(*fractions))
