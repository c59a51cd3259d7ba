"""What tasks with classes share: losses and metrics, for one label or several."""

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.data import Batch
from fedpeft.sections import DataSection
from fedpeft.tasks.task import Task


class Classification(Task):
    """A task with classes: whatever comes in, logits come out."""

    def losses(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns cross-entropies."""
        return class_losses(self.judge(module, batch, kept), batch.labels)

    def judge(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the logits, shape ``(batch, classes)``."""
        logits: torch.Tensor = module(**batch.inputs, kept=kept)
        return logits.float()

    def metrics(self, judged: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Returns accuracy and macro F1."""
        return class_metrics(judged, labels)


def main_metric(data: DataSection) -> str:
    """Returns what runs report: with several labels, most are absent anyway."""
    return "macro_f1" if data.multi_label else "accuracy"


def class_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns one loss an example, shape ``(batch,)``, in fp32.

    Cross-entropy for labels of shape ``(batch,)``; for ``(batch, classes)`` of 0 and 1
    the mean of the classes' binary cross-entropies.
    """
    if labels.dim() == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return F.binary_cross_entropy_with_logits(
        logits.float(), labels.float(), reduction="none"
    ).mean(1)


def class_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Returns accuracy and macro F1.

    Accuracy is the share of examples of which all labels are right. F1 of a class that
    is neither there nor predicted counts as 0.

    >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    >>> class_metrics(logits, torch.tensor([0, 1, 1]))["accuracy"]
    0.6666666666666666
    """
    if labels.dim() == 1:
        found, wanted = (
            F.one_hot(chosen, logits.shape[1]) for chosen in (logits.argmax(1), labels)
        )
    else:
        found, wanted = (logits > 0).long(), labels
    hits = (found * wanted).sum(0)
    f1 = 2 * hits / (found.sum(0) + wanted.sum(0)).clamp(min=1)
    right = int((found == wanted).all(1).sum())
    return {"accuracy": right / max(1, len(labels)), "macro_f1": float(f1.mean())}
