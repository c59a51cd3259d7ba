"""Dense: bytes and rounding by hand."""

import pytest
import torch

from fedpeft.compression import Dense
from fedpeft.seeds import generator


def body_of(compressor: Dense, values: list[float]) -> bytes:
    update = {"a": torch.tensor(values)}
    return compressor.compress(update, generator(0)).body


def round_trip(compressor: Dense, values: list[float]) -> list[float]:
    like = {"a": torch.zeros(len(values))}
    payload = compressor.compress({"a": torch.tensor(values)}, generator(0))
    decoded: list[float] = compressor.decompress(payload, like)["a"].tolist()
    return decoded


def test_bytes_are_little_endian() -> None:
    # 1.0 is 0x3f800000 in fp32, 0x3c00 in fp16, 0x3f80 in bf16.
    assert body_of(Dense(), [1.0, -1.0]).hex() == "0000803f000080bf"
    assert body_of(Dense("fp16"), [1.0, -1.0]).hex() == "003c00bc"
    assert body_of(Dense("bf16"), [1.0, -1.0]).hex() == "803f80bf"


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_bytes_by_formula(dtype: str, size: int) -> None:
    update = {"a": torch.ones(3, 5), "b": torch.ones(7)}
    payload = Dense(dtype).compress(update, generator(0))
    assert len(payload.header) == 5
    assert len(payload.body) == 22 * size
    assert len(payload.to_bytes()) == 14 + len("dense") + 5 + 22 * size
    assert Dense(dtype).entropy_bits(payload, update) == 22 * size * 8


def test_fp32_is_exact() -> None:
    values = torch.randn(1000, generator=generator(0)).tolist()
    assert round_trip(Dense(), values) == values


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_16_bits_round_to_the_nearest(dtype: str, bound: float) -> None:
    values = torch.randn(1000, generator=generator(0)).tolist()
    pairs = zip(round_trip(Dense(dtype), values), values, strict=True)
    errors = [abs(got - value) / abs(value) for got, value in pairs]
    assert bound / 2 < max(errors) <= bound


def test_values_beyond_the_range_are_clamped() -> None:
    assert round_trip(Dense("fp16"), [1e5, -3e38]) == [65504.0, -65504.0]
    largest = torch.finfo(torch.bfloat16).max
    assert round_trip(Dense("bf16"), [3.4e38, -3.4e38]) == [largest, -largest]


def test_fp64_beyond_fp32_is_clamped() -> None:
    wide = {"a": torch.tensor([1e300, -1e300], dtype=torch.float64)}
    payload = Dense().compress(wide, generator(0))
    decoded = Dense().decompress(payload, {"a": torch.zeros(2)})["a"]
    limits = torch.finfo(torch.float32)
    assert decoded.tolist() == [limits.max, limits.min]
