"""Ternary: signs, scales and sizes."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.compression import Dense, Ternary
from fedpeft.compression.groups import group_tensors
from fedpeft.compression.ternary import ternarize
from fedpeft.seeds import generator
from fedpeft.tensors import Tensors, flatten


def round_trip(compressor: Ternary, update: Tensors) -> Tensors:
    payload = compressor.compress(update, generator(0))
    return compressor.decompress(payload, update)


def small_adapter() -> Tensors:
    """About 6,000 values: 6 layers of two roles, and a head."""
    layers = {
        f"encoder.layer.{depth}.attention.{role}.lora_B.weight": (384, 1)
        for depth in range(6)
        for role in ("query", "value")
    }
    shapes = layers | {"classifier.weight": (3, 384), "classifier.bias": (3,)}
    rng = generator(0, "adapter")
    return {
        name: torch.randn(shape, generator=rng) * (0.1 if "bias" in name else 1.0)
        for name, shape in shapes.items()
    }


def test_hand_computed() -> None:
    update = {"a": torch.tensor([0.5, -4.0, 2.0, 0.0, 1.0])}
    # Two of five are kept, with scale (4 + 2) / 2.
    assert round_trip(Ternary(density=0.4), update)["a"].tolist() == [0, -3, 3, 0, 0]


def test_every_role_has_its_own_scale() -> None:
    update = {
        "layer.0.bias": torch.tensor([1.0, 0.0]),
        "layer.1.bias": torch.tensor([0.0, 3.0]),
        "layer.0.weight": torch.tensor([100.0, 1.0]),
    }
    decoded = round_trip(Ternary(density=0.5), update)
    assert decoded["layer.0.bias"].tolist() == [2.0, 0.0]
    assert decoded["layer.1.bias"].tolist() == [0.0, 2.0]
    assert decoded["layer.0.weight"].tolist() == [100.0, 0.0]


def test_zeros_among_the_kept_stay_zero_and_out_of_the_scale() -> None:
    update = {"a": torch.tensor([0.0, 6.0, 0.0, 0.0])}
    assert round_trip(Ternary(density=0.75), update)["a"].tolist() == [0, 6, 0, 0]


def test_ties_go_to_the_first() -> None:
    update = {"a": torch.tensor([1.0, -1.0, 1.0, -1.0])}
    assert round_trip(Ternary(density=0.5), update)["a"].tolist() == [1, -1, 0, 0]


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_no_other_scale_is_closer(density: float) -> None:
    values = torch.randn(500, generator=generator(0))
    signs, scale = ternarize(values, density)

    def error(factor: float) -> float:
        return float((values - factor * scale * signs).norm())

    assert error(1.0) < min(error(0.98), error(1.02))
    assert error(1.0) < float(values.norm())


def test_ternary_is_biased_whatever_the_rng() -> None:
    update = {"a": torch.tensor([3.0, 1.0])}
    compressor = Ternary(density=0.5)
    draws = [compressor.compress(update, generator(seed)) for seed in range(20)]
    decoded = [compressor.decompress(payload, update)["a"] for payload in draws]
    assert torch.stack(decoded).mean(0).tolist() == [3.0, 0.0]


def test_header_by_hand() -> None:
    update = {"a": torch.tensor([1.0, -2.0, 0.5, 0.1]), "b.0": torch.zeros(3)}
    payload = Ternary(density=0.5).compress(update, generator(0))
    # Group a: one negative, one positive, scale 1.5; group b: nothing, no scale.
    assert payload.header[4:] == b"\x01\x01" + struct.pack("<f", 1.5) + b"\x00\x00"
    # Entropy of 1, 2, 1 of four: 6 bits.
    assert Ternary(density=0.5).entropy_bits(payload, update) == 6.0
    assert len(payload.body) <= 4


def test_coded_signs_are_within_one_percent_of_their_entropy() -> None:
    # Four groups, 10,000 values in all, and as many more as it takes.
    for size in (2_500, 20_000):
        update = {
            f"{role}.{depth}": torch.randn(size // 2, generator=generator(size, depth))
            for role in "abcd"
            for depth in range(2)
        }
        for density in (0.05, 0.2, 0.5):
            compressor = Ternary(density=density)
            payload = compressor.compress(update, generator(0))
            bits = compressor.entropy_bits(payload, update)
            assert 8 * len(payload.body) <= 1.01 * bits


def test_thirty_times_smaller_than_dense_even_for_a_small_adapter() -> None:
    update = small_adapter()
    assert len(update) == 14
    assert flatten(update).numel() < 6_000
    assert len(group_tensors(update)) == 4
    size = len(Ternary(density=0.2).compress(update, generator(0)).to_bytes())
    assert size * 30 <= 4 * flatten(update).numel()
    assert size * 30 <= len(Dense().compress(update, generator(0)).to_bytes())


def test_what_is_ternary_already_comes_back_exactly() -> None:
    for density in (0.1, 0.5, 1.0):
        update = round_trip(Ternary(density=density), small_adapter())
        again = round_trip(Ternary(density=density), update)
        assert all(torch.equal(again[name], update[name]) for name in update)


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    density=st.floats(0.01, 1.0),
)
def test_at_most_the_ceiling_is_kept(values: list[float], density: float) -> None:
    update = {"a": torch.tensor(values)}
    decoded = round_trip(Ternary(density=density), update)["a"]
    assert int(decoded.count_nonzero()) <= -int(-density * len(values) // 1)
    assert len(decoded[decoded != 0].abs().unique()) <= 1
    assert (decoded * update["a"] >= 0).all()
