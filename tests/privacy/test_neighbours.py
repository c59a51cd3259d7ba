"""Neighbouring data sets on the real model: padding, chunks and rounding included."""

from pathlib import Path

import pytest
import torch

from client.site import Site, open_site
from fedpeft.data import physical_batches
from fedpeft.training import example_losses
from tests.helpers import small_config


def _released_sum(site: Site, indices: list[int]) -> torch.Tensor:
    """The sum of one step over some examples of client 0, without noise."""
    section = site.config.training
    examples = site.holding(0).examples
    units = [[index] for index in indices]
    for part in physical_batches(examples, units, section.max_physical_batch):
        chunk = [index for unit in part for index in unit]
        site.engine.accumulate(example_losses(site.model, examples, chunk, section))
    sums: list[torch.Tensor] = []
    site.engine.step(lambda total, _: sums.append(total.clone()) or total)
    return sums[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_more_review_moves_the_sum_by_at_most_the_norm(
    small_reviews: Path, precision: str
) -> None:
    clipping_norm = 0.05  # below every example's own norm, so that the bound is met
    site = open_site(
        small_config(
            small_reviews,
            f"training.precision={precision}",
            "training.max_physical_batch=7",
            f"privacy.clipping_norm={clipping_norm}",
        ).to_toml()
    )
    site.model.module.eval()
    everything = list(range(len(site.holding(0).examples)))
    whole = _released_sum(site, everything)
    moved = []
    for left_out in everything[::12]:
        others = [index for index in everything if index != left_out]
        change = (whole - _released_sum(site, others)).double()
        moved.append(float(change.norm()))
    assert max(moved) <= clipping_norm
    assert max(moved) > 0.9 * clipping_norm
