"""Canaries: examples whose gradients are whatever the auditor wants.

The model of a run is replaced by one that has as many trainable tensors and no other
layers. The loss of example i is the inner product of its own vector with all of them,
so that this vector *is* its gradient, whatever the state. All that comes after the
forward pass stays the real code: taps, clipping, noise, optimiser.

>>> from fedpeft.privacy import DpSgd
>>> model = canary_model({"adapter": 3, "head": 2})
>>> examples = as_examples(torch.eye(5))
>>> engine = DpSgd(clipping_norm=1.0, noise_multiplier=0.0, nominal_batch=1)
>>> engine.bind(model.module, model.operations)
>>> batch = model.task.collate(examples, [4])
>>> engine.per_sample_gradients(model.task.losses(model.module, batch))
tensor([[0., 0., 0., 0., 1.]])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fedpeft.backbone import Backbone
from fedpeft.data import Batch, Encoded, Examples
from fedpeft.errors import ConfigError
from fedpeft.interfaces import Operation
from fedpeft.model import TaskModel
from fedpeft.sections import DataSection
from fedpeft.tasks import Task, TaskModule

_NAME = "canaries"


class CanaryModule(TaskModule):
    """One linear layer a trainable tensor; the sum of what they say is a loss.

    Args:
        sizes: the numbers of values of the tensors, in order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        layers = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in sizes)
        super().__init__(layers, num_features=0, num_labels=0)
        self._sizes = list(sizes)

    def pool(
        self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Sums ``(batch, tensors)`` over the tensors."""
        return hidden.sum(1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns one loss an example, shape ``(batch,)``, from ``(batch, total)``.

        The last tensor is read like a head, one vector an example, the others at a
        position, like adapters: the two ways of per-sample gradients.
        """
        *parts, last = torch.split(rows, self._sizes, 1)
        *layers, head = self.backbone.children()
        said = [f(part[:, None])[:, 0] for f, part in zip(layers, parts, strict=True)]
        return self.pool(torch.cat([*said, head(last)], 1), {})


@dataclass(frozen=True)
class CanaryTask(Task):
    """Makes batches of canaries; what is asked of them is their loss."""

    metric: str = "loss"
    is_loss: ClassVar[bool] = True

    @classmethod
    def of(cls, backbone: Backbone, data: DataSection) -> "CanaryTask":
        """Canaries suit every backbone and need no data."""
        return cls()

    def build(self, backbone: Backbone, num_labels: int) -> CanaryModule:
        """Returns a module with tensors as large as those that train."""
        trained = (p for p in backbone.module.parameters() if p.requires_grad)
        return CanaryModule([parameter.numel() for parameter in trained])

    def encode(self, examples: Examples) -> Encoded:
        """Refuses: canaries are made by the auditor, and are nobody's data."""
        raise ConfigError("Expected canaries, got examples: they are not to mix.")

    def collate(self, encoded: Encoded, indices: Sequence[int]) -> Batch:
        """Stacks the canaries at `indices`, shape ``(batch, total)``."""
        rows = torch.stack([encoded.inputs[index] for index in indices])
        return Batch({"rows": rows}, encoded.labels[list(indices)])

    def losses(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns each canary's inner product with the trainable state."""
        losses: torch.Tensor = module(**batch.inputs)
        return losses.float()

    def judge(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the losses."""
        return self.losses(module, batch)

    def metrics(self, judged: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Returns the mean loss."""
        return {self.metric: float(judged.mean())}


def canary_model(sizes: Mapping[str, int]) -> TaskModel:
    """Returns a model whose per-sample gradients are the examples themselves.

    Args:
        sizes: number of values of each trainable tensor; names are for the reader.
    """
    module = CanaryModule(list(sizes.values()))
    operations = [
        Operation(layer, "linear", dict(layer.named_parameters()))
        for layer in module.backbone.children()
    ]
    return TaskModel(module, operations, CanaryTask(), _NAME, {})


def tensor_sizes(
    model: TaskModel, *, most: int, tensors: int | None = None
) -> dict[str, int]:
    """Returns the sizes of what trains in a run's model, scaled down to a total.

    **Guarantees**: none is empty; their shares are kept as nearly as whole numbers
    allow; `most` values in all, or one a tensor if that is more.

    Args:
        model: of a run.
        most: values in all.
        tensors: how many at most, evenly spaced and the last among them; None for all.
    """
    own = [
        (n, p.numel()) for n, p in model.module.named_parameters() if p.requires_grad
    ]
    if tensors is not None and len(own) > tensors:
        own = [own[-1 - place * len(own) // tensors] for place in range(tensors)][::-1]
    total = sum(size for _, size in own)
    if total <= most:
        return dict(own)
    return {name: max(1, size * most // total) for name, size in own}


def as_examples(rows: torch.Tensor, persons: Sequence[int] | None = None) -> Encoded:
    """Returns rows, shape ``(examples, total)``, as examples of a client.

    Args:
        rows: the gradients; none at all is a client without examples.
        persons: whose each is.
    """
    whose = None if persons is None else torch.tensor(persons, dtype=torch.int64)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    return Encoded(list(rows.float()), labels, whose)


def spread_direction(sizes: Mapping[str, int]) -> torch.Tensor:
    """Returns a unit vector with as much of its square in every tensor.

    >>> spread_direction({"a": 1, "b": 4}).square()
    tensor([0.5000, 0.1250, 0.1250, 0.1250, 0.1250])
    """
    values = [torch.full((n,), (n * len(sizes)) ** -0.5) for n in sizes.values()]
    return torch.cat(values)
