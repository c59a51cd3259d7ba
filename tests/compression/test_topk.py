"""TopK: what is kept, and bytes by formula."""

import pytest
import torch

from fedpeft.compression import TopK
from fedpeft.compression.selection import largest, num_kept
from fedpeft.seeds import generator
from fedpeft.tensors import Tensors, norm, subtract


def round_trip(compressor: TopK, update: Tensors) -> Tensors:
    payload = compressor.compress(update, generator(0))
    return compressor.decompress(payload, update)


def test_the_largest_values_are_kept_exactly() -> None:
    update = {"a": torch.tensor([0.5, -4.0, 3.0, 1.0, -2.0])}
    assert round_trip(TopK(density=0.4), update)["a"].tolist() == [0, -4, 3, 0, 0]


def test_layers_of_a_role_compete_and_roles_do_not() -> None:
    update = {
        "layer.0.a": torch.tensor([10.0, 9.0]),
        "layer.1.a": torch.tensor([1.0, 2.0]),
        "layer.0.b": torch.tensor([0.1, 0.2]),
    }
    decoded = round_trip(TopK(density=0.5), update)
    assert decoded["layer.0.a"].tolist() == [10.0, 9.0]
    assert decoded["layer.1.a"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(decoded["layer.0.b"], torch.tensor([0.0, 0.2]))


def test_bytes_by_formula() -> None:
    # 8 of 16 kept: a mask of 16 bits; header: check, type, one count of one byte.
    update = {"a": torch.arange(1.0, 17.0)[torch.randperm(16, generator=generator(1))]}
    for dtype, size in (("fp32", 4), ("fp16", 2)):
        compressor = TopK(density=0.5, dtype=dtype)
        payload = compressor.compress(update, generator(0))
        assert len(payload.header) == 4 + 1 + 1
        assert 2 <= len(payload.body) - 8 * size <= 5
        assert compressor.entropy_bits(payload, update) == 16 + 8 * size * 8


def test_density_one_is_dense_without_a_mask() -> None:
    update = {"a": torch.randn(100, generator=generator(0))}
    payload = TopK(density=1.0).compress(update, generator(0))
    assert len(payload.body) == 400
    assert torch.equal(round_trip(TopK(density=1.0), update)["a"], update["a"])


def test_zeros_among_the_kept_do_not_travel() -> None:
    update = {"a": torch.tensor([0.0, 0.0, 5.0, 0.0])}
    payload = TopK(density=1.0).compress(update, generator(0))
    assert payload.header[5:] == b"\x01"
    # 1e-9 is 0 in fp16.
    update = {"a": torch.tensor([1e-9, 2.0])}
    decoded = round_trip(TopK(density=1.0, dtype="fp16"), update)
    assert decoded["a"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_squared_error_is_at_most_the_dropped_share(density: float) -> None:
    update = {"a": torch.randn(1000, generator=generator(0))}
    error = norm(subtract(update, round_trip(TopK(density=density), update)))
    assert error**2 <= (1 - density) * norm(update) ** 2
    # Equal values reach the bound.
    equal = {"a": torch.ones(1000)}
    error = norm(subtract(equal, round_trip(TopK(density=density), equal)))
    assert error**2 == pytest.approx((1 - density) * 1000)


def test_topk_is_biased_whatever_the_rng() -> None:
    update = {"a": torch.tensor([3.0, 1.0])}
    compressor = TopK(density=0.5)
    draws = [compressor.compress(update, generator(seed)) for seed in range(20)]
    decoded = [compressor.decompress(payload, update)["a"] for payload in draws]
    assert torch.stack(decoded).mean(0).tolist() == [3.0, 0.0]


def test_the_count_is_the_decimal_ceiling() -> None:
    assert [num_kept(0.2, size) for size in (0, 1, 5, 6, 10)] == [0, 1, 1, 2, 2]
    assert num_kept(0.07, 100) == 7
    assert num_kept(1e-9, 10) == 1
    assert num_kept(1, 10) == 10


@pytest.mark.parametrize("count", range(7))
def test_ties_never_exceed_the_count(count: int) -> None:
    values = torch.tensor([2.0, -1.0, 1.0, -2.0, 1.0, 0.0])
    order = [0, 3, 1, 2, 4, 5]  # by magnitude, then by position
    marked = largest(values, count).nonzero().squeeze(1).tolist()
    assert marked == sorted(order[:count])


def test_largest_equals_a_stable_sort() -> None:
    values = torch.randint(-9, 10, (500,), generator=generator(0)).float()
    order = values.abs().sort(descending=True, stable=True).indices
    for count in (1, 17, 250, 499):
        marked = largest(values, count).nonzero().squeeze(1)
        assert torch.equal(marked, order[:count].sort().values)
