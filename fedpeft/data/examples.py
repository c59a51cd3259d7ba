"""What every data set is, once read: contents, labels, perhaps whose they are."""

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Completion:
    """An instruction and the answer that is to be learned.

    Attributes:
        prompt: what is given.
        completion: what the model should go on with.
    """

    prompt: str
    completion: str


Content: TypeAlias = str | torch.Tensor | Path | Completion
"""A text; an image, uint8 of shape ``(height, width)`` or ``(height, width, 3)``, or
its file; or a prompt with its completion."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled contents, all of one kind.

    Attributes:
        contents: one an example.
        labels: positions in `label_names`, shape ``(num_examples,)``, int64; or, where
            an example may have several, 0 or 1 a class, shape ``(num_examples,
            num_classes)``. Without classes all are 0.
        groups: each example's group (a site, a film), or None if there are no groups.
        label_names: the classes as declared; a class may have no example. One empty
            name where there are no classes.
        persons: whose record each example is, or None if that is not known.

    Raises:
        ValueError: if the parts disagree in length or a label has no name.
    """

    contents: tuple[Content, ...]
    labels: torch.Tensor
    groups: tuple[str, ...] | None
    label_names: tuple[str, ...]
    persons: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        num_examples, num_classes = len(self.contents), len(self.label_names)
        shapes = ((num_examples,), (num_examples, num_classes))
        if self.labels.shape not in shapes or self.labels.dtype != torch.int64:
            raise ValueError(
                f"Expected {num_examples} int64 labels, one an example, got shape "
                f"{tuple(self.labels.shape)} of {self.labels.dtype}."
            )
        for kind, names in (("groups", self.groups), ("persons", self.persons)):
            if names is not None and len(names) != num_examples:
                raise ValueError(
                    f"Expected {num_examples} {kind}, one an example, got {len(names)}."
                )
        largest = 1 if self.is_multi_label else num_classes - 1
        is_named = (self.labels >= 0) & (self.labels <= largest)
        if not bool(is_named.all()):
            raise ValueError(
                f"Expected labels in 0..{largest}, got "
                f"{self.labels[~is_named][0].item()}."
            )

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def is_multi_label(self) -> bool:
        """Whether an example may have several labels, or none."""
        return self.labels.dim() == 2

    def subset(self, indices: Sequence[int]) -> "Examples":
        """Returns the examples at `indices`, in that order."""
        return Examples(
            contents=tuple(self.contents[i] for i in indices),
            labels=self.labels[torch.tensor(indices, dtype=torch.int64)],
            groups=self.groups and tuple(self.groups[i] for i in indices),
            label_names=self.label_names,
            persons=self.persons and tuple(self.persons[i] for i in indices),
        )

    def indices_by_group(self) -> dict[str, list[int]]:
        """Returns each group's indices, ascending; groups by name.

        Raises:
            ValueError: if there are no groups.
        """
        if self.groups is None:
            raise ValueError("Expected examples with groups, got none.")
        return dict(sorted(indices_by(self.groups).items()))


def digest_of(content: Content) -> str:
    """Returns a text that tells contents apart: the text itself, or a hash.

    >>> digest_of("a text")
    'a text'
    """
    if isinstance(content, str):
        return content
    if isinstance(content, Completion):
        return json.dumps([content.prompt, content.completion])
    if isinstance(content, Path):
        return hashlib.sha256(content.read_bytes()).hexdigest()
    data = content.numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def indices_by(names: Iterable[Name]) -> dict[Name, list[int]]:
    """Returns the indices at which each name stands, ascending; names as they appear.

    >>> indices_by("abca")
    {'a': [0, 3], 'b': [1], 'c': [2]}
    """
    indices: dict[Name, list[int]] = {}
    for index, name in enumerate(names):
        indices.setdefault(name, []).append(index)
    return indices
