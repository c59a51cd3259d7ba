"""Entries of a pool weighted by noised counts, three tiny clients at a time."""

import pytest
import torch

from fedpeft.aggregation import PoolWeighted
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.interfaces import Update
from fedpeft.menus import check_variants
from fedpeft.tensors import Tensors
from tests.helpers import SMALL


def update(counts: list[float], entries: list[float], head: float) -> Update:
    return Update(
        {
            "backbone.layer.1.pool_scale": torch.tensor(entries).unsqueeze(1),
            "backbone.layer.2.pool_counts": torch.tensor(counts),
            "head.bias": torch.tensor([head]),
        }
    )


def step_of(*updates: Update) -> Tensors:
    return PoolWeighted().aggregate(updates, {})[0]


def test_an_entry_is_the_mean_weighted_by_its_counts() -> None:
    step = step_of(
        update([3.0, 0.0], [1.0, 7.0], 0.0),
        update([1.0, 2.0], [5.0, 4.0], 3.0),
        update([0.0, 2.0], [9.0, 8.0], 6.0),
    )
    assert step["backbone.layer.1.pool_scale"].flatten().tolist() == [2.0, 6.0]
    assert step["head.bias"].tolist() == [3.0]
    counts = step["backbone.layer.2.pool_counts"]
    assert torch.allclose(counts, torch.tensor([4 / 3, 4 / 3]))


def test_noise_below_zero_counts_as_zero() -> None:
    step = step_of(
        update([-5.0, 1.0], [1.0, 2.0], 0.0), update([1.0, -0.1], [3.0, 4.0], 0.0)
    )
    assert step["backbone.layer.1.pool_scale"].flatten().tolist() == [3.0, 2.0]


def test_an_entry_that_counts_for_no_client_stays() -> None:
    step = step_of(
        update([0.0, 1.0], [1.0, 2.0], 0.0), update([-1.0, 1.0], [3.0, 4.0], 0.0)
    )
    assert step["backbone.layer.1.pool_scale"].flatten().tolist() == [0.0, 3.0]


def test_other_entries_than_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected 3 entries in .*pool_scale"):
        step_of(update([1.0, 1.0, 1.0], [1.0, 2.0], 0.0))
    with pytest.raises(ValueError, match="same names and shapes"):
        step_of(update([1.0], [1.0], 0.0), update([1.0, 1.0], [1.0, 1.0], 0.0))
    with pytest.raises(ValueError, match="at least one update"):
        step_of()


POOL = ("peft.name=ssf_pool", "peft.counts=true")


def check(*overrides: str) -> None:
    text = SMALL.replace("rank = 2\n", "").format(path="reviews.csv")
    check_variants(RunConfig.from_toml(text, overrides))


def test_counts_go_with_plain_sgd_alone() -> None:
    check(*POOL, "aggregation.name=pool_weighted")
    check(*POOL)
    for other in (
        "training.optimizer=adamw",
        "training.momentum=0.9",
        "training.weight_decay=0.1",
    ):
        with pytest.raises(ConfigError, match="'sgd' without momentum"):
            check(*POOL, other)


def test_weights_by_counts_need_counts() -> None:
    for name in ("ssf_pool", "ssf"):
        with pytest.raises(ConfigError, match=r"counts = true beside 'pool_weighted'"):
            check(f"peft.name={name}", "aggregation.name=pool_weighted")
