import threading

import pytest
import torch
from scipy import stats

from fedpeft.privacy import SecureRandomness, SeededRandomness, noise_ahead
from fedpeft.privacy.randomness import Randomness


class _Numbered(Randomness):
    """Vectors that say how many were made before them."""

    def __init__(self, fail_at: int = 10**9) -> None:
        self.made = 0
        self._fail_at = fail_at

    def uniform(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def gaussian(self, count: int) -> torch.Tensor:
        if self.made == self._fail_at:
            raise OSError("no entropy")
        self.made += 1
        return torch.full((count,), float(self.made), dtype=torch.float64)


def test_a_seeded_source_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="seeded"),
        noise_ahead(SeededRandomness(0), 2, 1),
    ):
        pass


def test_each_vector_is_handed_out_once_in_order() -> None:
    with noise_ahead(_Numbered(), size=3, count=5) as ahead:
        drawn = [float(ahead.gaussian(3)[0]) for _ in range(5)]
    assert drawn == [1, 2, 3, 4, 5]


def test_another_size_and_more_than_the_count_are_made_on_demand() -> None:
    source = _Numbered()
    with noise_ahead(source, size=3, count=1) as ahead:
        assert len(ahead.gaussian(7)) == 7
        assert len(ahead.gaussian(3)) == len(ahead.gaussian(3)) == 3
    assert source.made == 3


def test_what_is_made_ahead_is_bounded_and_the_thread_ends() -> None:
    source = _Numbered()
    before = threading.active_count()
    with noise_ahead(source, size=2, count=1000) as ahead:
        ahead.gaussian(2)
    assert threading.active_count() == before
    assert source.made <= 4


def test_an_error_of_the_thread_is_raised_where_its_value_is_missing() -> None:
    with noise_ahead(_Numbered(fail_at=1), size=2, count=3) as ahead:
        ahead.gaussian(2)
        with pytest.raises(OSError, match="no entropy"):
            ahead.gaussian(2)


def test_the_values_are_standard_gaussians_that_never_repeat() -> None:
    with noise_ahead(SecureRandomness(), size=20_000, count=3) as ahead:
        drawn = torch.stack([ahead.gaussian(20_000) for _ in range(3)])
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-6
    assert drawn.unique().numel() == drawn.numel()
