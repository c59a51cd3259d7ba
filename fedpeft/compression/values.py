"""Tensors to one vector of finite values to bytes, and back."""

from typing import Literal, get_args

import numpy as np
import torch

from fedpeft.compression.groups import in_group_order
from fedpeft.errors import InvalidPayload
from fedpeft.tensors import Tensors, flatten, unflatten

ValueType = Literal["fp32", "fp16", "bf16"]

VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)

_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The integers that carry the bits: torch names no byte order, numpy has no bfloat16.
_INTEGERS: dict[ValueType, tuple[str, torch.dtype]] = {
    "fp32": ("<i4", torch.int32),
    "fp16": ("<i2", torch.int16),
    "bf16": ("<i2", torch.int16),
}


def check_value_type(dtype: str) -> None:
    """Raises ValueError unless `dtype` is one of :data:`VALUE_TYPES`."""
    if dtype not in VALUE_TYPES:
        raise ValueError(f"Expected dtype in {', '.join(VALUE_TYPES)}, got {dtype!r}.")


def to_vector(update: Tensors) -> torch.Tensor:
    """Returns the update in group order as fp32, shape ``(total,)``, on the CPU.

    Values beyond fp32 (of an fp64 update) become its largest value.

    Raises:
        ValueError: if a value is not finite.
    """
    vector = flatten(in_group_order(update)).detach().cpu()
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(
            "Expected an update of finite values, got NaN or infinity: the training "
            "diverged; lower the learning rate."
        )
    return vector.float() if vector.dtype != torch.float64 else _round(vector, "fp32")


def from_vector(vector: torch.Tensor, like: Tensors) -> Tensors:
    """Cuts a vector in group order into the names, shapes and dtypes of `like`.

    Raises:
        InvalidPayload: if a value is not finite in the template's dtype.
    """
    parts = unflatten(vector, in_group_order(like))
    tensors = {
        name: parts[name].to(device=tensor.device, dtype=tensor.dtype)
        for name, tensor in like.items()
    }
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidPayload(
                f"Expected finite values of {tensor.dtype} for {name}, got others."
            )
    return tensors


def round_values(vector: torch.Tensor, dtype: ValueType) -> torch.Tensor:
    """Returns fp32 values rounded to `dtype`, still as fp32.

    **Guarantees**: rounds to the nearest, relative error at most ``2**-11`` (fp16) or
    ``2**-8`` (bf16) in the normal range; fp32 is exact. A value beyond the range is
    clamped to the largest of its sign, never refused: it stays finite, and error
    feedback carries the rest into the next round.

    >>> round_values(torch.tensor([1e6, 1e-9]), "fp16")
    tensor([65504.,     0.])
    """
    return vector if dtype == "fp32" else _round(vector, dtype).float()


def num_bytes(count: int, dtype: ValueType) -> int:
    """Returns the size of `count` values on the wire."""
    return count * _TORCH[dtype].itemsize


def to_bytes(vector: torch.Tensor, dtype: ValueType) -> bytes:
    """Returns fp32 values as little-endian numbers of `dtype`, clamped to its range."""
    order, integer = _INTEGERS[dtype]
    bits: bytes = _round(vector, dtype).view(integer).numpy().astype(order).tobytes()
    return bits


def from_bytes(data: bytes, dtype: ValueType) -> torch.Tensor:
    """Reads what :func:`to_bytes` wrote; returns fp32 values, shape ``(count,)``."""
    order, integer = _INTEGERS[dtype]
    # Widened to the machine's byte order, in memory of its own that may be written.
    bits = np.frombuffer(data, dtype=order).astype(order[1:])
    return torch.from_numpy(bits).to(integer).view(_TORCH[dtype]).float()


def _round(vector: torch.Tensor, dtype: ValueType) -> torch.Tensor:
    largest = torch.finfo(_TORCH[dtype]).max
    return vector.clamp(-largest, largest).to(_TORCH[dtype])
