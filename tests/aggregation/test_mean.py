"""The mean of three tiny clients, written out."""

import pytest
import torch

from fedpeft.aggregation import Mean
from fedpeft.interfaces import Update
from fedpeft.tensors import Tensors


def clients(*num_examples: int | None) -> list[Update]:
    values = ([1.0, 0.0], [2.0, 3.0], [6.0, -9.0])
    return [
        Update({"a": torch.tensor(value)}, num_examples=count)
        for value, count in zip(values, num_examples, strict=True)
    ]


def mean_of(rule: Mean, updates: list[Update]) -> Tensors:
    step, state = rule.aggregate(updates, rule.init(updates[0].tensors))
    assert state == {}
    return step


def test_uniform() -> None:
    step = mean_of(Mean(), clients(None, None, None))
    assert step["a"].tolist() == [3.0, -2.0]


def test_uniform_ignores_the_numbers_of_examples() -> None:
    assert mean_of(Mean(), clients(1, 1000, 3))["a"].tolist() == [3.0, -2.0]


def test_by_examples() -> None:
    # (1*1 + 2*2 + 1*6) / 4 and (1*0 + 2*3 + 1*-9) / 4.
    step = mean_of(Mean(weighting="examples"), clients(1, 2, 1))
    assert step["a"].tolist() == [2.75, -0.75]


def test_a_client_without_examples_has_no_weight() -> None:
    step = mean_of(Mean(weighting="examples"), clients(2, 0, 0))
    assert step["a"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((1, None, 1), "under privacy a client does not tell it"),
        ((1, -1, 1), "num_examples >= 0, got -1"),
        ((0, 0, 0), "positive weight"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(
    counts: tuple[int | None, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mean_of(Mean(weighting="examples"), clients(*counts))


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match="uniform, examples, got 'size'"):
        Mean(weighting="size")


def test_many_small_updates_are_not_lost_in_a_large_one() -> None:
    # In fp32, 2**24 + 1 is 2**24: the sum would forget all but the first.
    values = [2.0**24, *[1.0] * 1023]
    updates = [Update({"a": torch.tensor([value])}) for value in values]
    assert mean_of(Mean(), updates)["a"].item() == pytest.approx(16385, abs=1e-2)


def test_one_attacker_moves_the_mean_by_its_share() -> None:
    honest = [Update({"a": torch.tensor([1.0])})] * 9
    attacker = Update({"a": torch.tensor([1001.0])})
    assert mean_of(Mean(), [*honest, attacker])["a"].item() == 101.0
