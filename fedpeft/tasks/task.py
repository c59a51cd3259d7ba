"""What a task is: from examples to losses and metrics."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from torch import nn

from fedpeft.backbone import Backbone
from fedpeft.data import Batch, Content, Encoded, Examples
from fedpeft.errors import ConfigError
from fedpeft.sections import DataSection
from fedpeft.tasks.module import TaskModule

Kind = TypeVar("Kind")


class Task(ABC):
    """One kind of question to a backbone. Frozen dataclasses, one file each.

    Attributes:
        metric: the name of the one of its metrics that runs report.
        is_loss: whether a smaller metric is a better one.
    """

    metric: str
    is_loss: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of(cls, backbone: Backbone, data: DataSection) -> "Task":
        """Returns the task as a backbone and the data want it.

        Raises:
            ConfigError: if the backbone cannot do it; says what is missing.
        """

    @abstractmethod
    def build(self, backbone: Backbone, num_labels: int) -> TaskModule:
        """Puts the task's head on a backbone, which has its method already."""

    @abstractmethod
    def encode(self, examples: Examples) -> Encoded:
        """Returns the examples as the model takes them.

        Raises:
            ConfigError: for contents of another kind.
            DataError: for a content that cannot be read.
        """

    @abstractmethod
    def collate(self, encoded: Encoded, indices: Sequence[int]) -> Batch:
        """Puts the examples at `indices`, at least one, side by side."""

    @abstractmethod
    def losses(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns one loss an example, shape ``(batch,)``, in fp32.

        Args:
            module: of :meth:`build`.
            batch: of :meth:`collate`.
            kept: what the frozen part gave for these examples, if that is at hand.
        """

    @abstractmethod
    def judge(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns what the metrics need of each example, shape ``(batch, ...)``."""

    @abstractmethod
    def metrics(self, judged: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Returns the metrics by name, :attr:`metric` among them.

        Args:
            judged: of :meth:`judge`, all examples' together.
            labels: theirs.
        """


def contents_of(examples: Examples, *kinds: type[Kind], task: str) -> list[Kind]:
    """Returns the contents, all of the kinds given.

    Raises:
        ConfigError: if one is of another.
    """
    found: list[Kind] = [
        content for content in examples.contents if isinstance(content, kinds)
    ]
    if len(found) < len(examples):
        other = next(c for c in examples.contents if not isinstance(c, kinds))
        raise ConfigError(
            f"[model] task: expected data for {task}, got {_noun(other)}; name the "
            "task that the data are for."
        )
    return found


def _noun(content: Content) -> str:
    if isinstance(content, str):
        return "texts"
    is_image = not hasattr(content, "completion")
    return "images" if is_image else "prompts with completions"
