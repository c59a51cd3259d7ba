"""Tensor groups: tensors of one role over all layers.

The scale of an update differs by role (a low-rank factor, a bias, the head), hardly by
depth. So all compressors treat the layers of a role as one population: one scale, one
set of counts, one symbol model. The vector they work on holds the tensors in *group
order*, in which every group is one contiguous range.
"""

import re
from dataclasses import dataclass
from itertools import groupby

import torch

from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class Group:
    """The range ``start <= index < stop`` of the vector that one role fills."""

    role: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of values."""
        return self.stop - self.start

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns the group's part of the vector, shape ``(size,)``, as a view."""
        return vector[self.start : self.stop]


def role_of(name: str) -> str:
    """Returns the name without its layer numbers.

    >>> role_of("layer.11.query.lora_A.weight")
    'layer.*.query.lora_A.weight'
    """
    return re.sub(r"\d+", "*", name)


def in_group_order(tensors: Tensors) -> Tensors:
    """Returns the tensors sorted by role and name, whatever order they came in.

    A template read back from a file may list the same names in another order.
    """
    return {name: tensors[name] for name in sorted(tensors, key=_role_and_name)}


def group_tensors(like: Tensors) -> tuple[Group, ...]:
    """Returns the groups of a template, in the order of the vector.

    >>> like = {"b.1": torch.zeros(2), "a": torch.zeros(3), "b.0": torch.zeros(2)}
    >>> group_tensors(like)
    (Group(role='a', start=0, stop=3), Group(role='b.*', start=3, stop=7))
    """
    groups, start = [], 0
    for role, names in groupby(in_group_order(like), key=role_of):
        stop = start + sum(like[name].numel() for name in names)
        groups.append(Group(role, start, stop))
        start = stop
    return tuple(groups)


def _role_and_name(name: str) -> tuple[str, str]:
    return role_of(name), name
