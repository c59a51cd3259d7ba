"""Algebra on named tensors: the vocabulary in which updates are spoken."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch

Tensors: TypeAlias = dict[str, torch.Tensor]


def flatten(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Concatenates all tensors, in their order, into one vector of shape ``(total,)``.

    >>> flatten({"a": torch.ones(2), "b": torch.zeros(1, 1)})
    tensor([1., 1., 0.])
    """
    if not tensors:
        return torch.zeros(0)
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflatten(flat: torch.Tensor, like: Mapping[str, torch.Tensor]) -> Tensors:
    """Cuts a vector of shape ``(total,)`` into tensors named and shaped as in `like`.

    Raises:
        ValueError: if the vector's length is not the total of `like`.
    """
    sizes = [tensor.numel() for tensor in like.values()]
    if flat.numel() != sum(sizes):
        raise ValueError(f"Expected {sum(sizes)} values, got {flat.numel()}.")
    parts = zip(like.items(), torch.split(flat, sizes), strict=True)
    return {name: part.view(tensor.shape) for (name, tensor), part in parts}


def add(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> Tensors:
    """Returns ``left + right``, name by name."""
    return {name: tensor + right[name] for name, tensor in left.items()}


def subtract(
    left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]
) -> Tensors:
    """Returns ``left - right``, name by name."""
    return {name: tensor - right[name] for name, tensor in left.items()}


def scale(tensors: Mapping[str, torch.Tensor], factor: float) -> Tensors:
    """Returns ``factor * tensors``."""
    return {name: tensor * factor for name, tensor in tensors.items()}


def zeros_like(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Returns zeros with the names, shapes and dtypes of `tensors`."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Returns the joint L2 norm.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    5.0
    """
    return float(torch.linalg.vector_norm(flatten(tensors).double()))


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Returns the tensors under ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Returns the tensors under ``prefix.``, without the prefix."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def fingerprint(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Returns the sha256 over names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()
