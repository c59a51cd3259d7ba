"""Metrics of a task on held-out data."""

import torch

from fedpeft.data import Encoded, physical_batches
from fedpeft.features import KeptFeatures, autocast
from fedpeft.model import TaskModel


def evaluate(
    model: TaskModel,
    examples: Encoded,
    precision: str,
    batch_size: int = 64,
    kept: KeptFeatures | None = None,
) -> dict[str, float]:
    """Returns the task's metrics by name.

    Args:
        model: as it stands.
        examples: the server's own public held-out data, never a client's.
        precision: ``fp32`` or ``bf16``.
        batch_size: examples that pass through the model at once.
        kept: what the frozen part of the model gave for these examples in the past.
    """
    model.module.eval()
    judged, labels = [], []
    everything = examples.units(by_person=False)
    with torch.inference_mode(), autocast(model.device, precision):
        for part in physical_batches(examples, everything, batch_size):
            indices = [index for unit in part for index in unit]
            batch = model.task.collate(examples, indices).to(model.device)
            features = kept.of(indices) if kept else None
            judged.append(model.task.judge(model.module, batch, features).cpu())
            labels.append(batch.labels.cpu())
    return model.task.metrics(torch.cat(judged), torch.cat(labels))
