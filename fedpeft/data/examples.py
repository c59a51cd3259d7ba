"""What every data set is, once read: texts, labels and, where known, whose they are."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, eq=False)
class TextExamples:
    """Labelled texts.

    Attributes:
        texts: one text an example.
        labels: positions in `label_names`, shape ``(num_examples,)``, int64.
        groups: each example's group (a site, a film), or None if there are no groups.
        label_names: the classes as declared; a class may have no example.
        persons: whose record each example is, or None if that is not known.

    Raises:
        ValueError: if the parts disagree in length or a label has no name.
    """

    texts: tuple[str, ...]
    labels: torch.Tensor
    groups: tuple[str, ...] | None
    label_names: tuple[str, ...]
    persons: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        num_examples = len(self.texts)
        if self.labels.shape != (num_examples,) or self.labels.dtype != torch.int64:
            raise ValueError(
                f"Expected {num_examples} int64 labels, one a text, got shape "
                f"{tuple(self.labels.shape)} of {self.labels.dtype}."
            )
        for kind, names in (("groups", self.groups), ("persons", self.persons)):
            if names is not None and len(names) != num_examples:
                raise ValueError(
                    f"Expected {num_examples} {kind}, one a text, got {len(names)}."
                )
        is_named = (self.labels >= 0) & (self.labels < len(self.label_names))
        if not bool(is_named.all()):
            raise ValueError(
                f"Expected labels in 0..{len(self.label_names) - 1}, got "
                f"{self.labels[~is_named][0].item()}."
            )

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Sequence[int]) -> "TextExamples":
        """Returns the examples at `indices`, in that order."""
        return TextExamples(
            texts=tuple(self.texts[i] for i in indices),
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


def indices_by(names: Iterable[Name]) -> dict[Name, list[int]]:
    """Returns the indices at which each name stands, ascending; names as they appear.

    >>> indices_by("abca")
    {'a': [0, 3], 'b': [1], 'c': [2]}
    """
    indices: dict[Name, list[int]] = {}
    for index, name in enumerate(names):
        indices.setdefault(name, []).append(index)
    return indices
