"""Metrics of a task on held-out data."""

import torch

from fedpeft.data import Encoded, collate, physical_batches
from fedpeft.model import TaskModel
from fedpeft.training import autocast

METRIC = "accuracy"


def evaluate(
    model: TaskModel, examples: Encoded, precision: str, batch_size: int = 64
) -> float:
    """Returns the share of examples whose largest logit is the label's, in 0..1.

    Args:
        model: as it stands.
        examples: the server's own public held-out data, never a client's.
        precision: ``fp32`` or ``bf16``.
        batch_size: examples that pass through the model at once.
    """
    model.module.eval()
    right = 0
    everything = examples.units(by_person=False)
    with torch.inference_mode(), autocast(model.device, precision):
        for part in physical_batches(examples, everything, batch_size):
            indices = [index for unit in part for index in unit]
            batch = collate(examples, indices, model.tokenizer.pad_token_id)
            batch = batch.to(model.device)
            logits = model.module(batch.input_ids, batch.attention_mask)
            right += int((logits.argmax(1) == batch.labels).sum())
    return right / len(examples)
