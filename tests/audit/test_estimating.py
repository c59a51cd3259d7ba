"""Figures of an attack: what a value can be bounds what is not known of it."""

import math

import torch

from fedpeft.audit.estimating import differences, estimate


def _ones(count: int) -> list[torch.Tensor]:
    return [torch.ones(1, dtype=torch.float64)] * count


def test_a_likeness_that_never_varies_has_an_interval_all_the_same() -> None:
    found = estimate([1.0000001 * value for value in _ones(50)], "", seed=0)
    assert (found.value, found.high) == (1.0, 1.0)
    # At most 1 - 0.025 ** (1 / 50) = 7.1 % are others, and at least -1.
    assert abs(found.low - (1 - 2 * 0.0711)) < 1e-3


def test_a_difference_of_likenesses_has_twice_their_range() -> None:
    own = [{"ssim": value} for value in _ones(20)]
    other = [{"ssim": -value} for value in _ones(20)]
    assert differences(own, other, {"ssim": ""}, 0)["ssim"].high == 2.0


def test_decibels_have_no_largest_value() -> None:
    assert estimate([2 * value for value in _ones(3)], "dB", seed=0).high == math.inf
