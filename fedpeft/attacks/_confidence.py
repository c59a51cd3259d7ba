"""How sure a model is of records: what attacks on a released model look at."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from fedpeft.data import Encoded, physical_batches
from fedpeft.model import TaskModel, load_trainable_state
from fedpeft.tasks.classes import Classification
from fedpeft.tensors import Tensors, fingerprint

_BATCH = 64


_KEPT: WeakKeyDictionary[nn.Module, dict[tuple[str, bytes], torch.Tensor]] = (
    WeakKeyDictionary()
)
"""What was judged already, by state and record: victims share many candidates."""


def judged(model: TaskModel, state: Tensors, examples: Encoded) -> torch.Tensor:
    """Returns what the task's metrics need of each record, shape ``(records, ...)``.

    A record is judged once in a state, and remembered as long as the model is.

    Args:
        model: any trainable state; it may be overwritten.
        state: of the model that is asked.
        examples: the records.
    """
    known = _KEPT.setdefault(model.module, {})
    of_state = fingerprint(state.items())
    keys = [(of_state, _content(examples, i)) for i in range(len(examples))]
    new = [index for index, key in enumerate(keys) if key not in known]
    if new:
        load_trainable_state(model, state)
        for index, row in _judge(model, examples.subset(new)):
            known[keys[new[index]]] = row
    return torch.stack([known[key] for key in keys])


@torch.no_grad()
def _judge(model: TaskModel, examples: Encoded) -> Iterator[tuple[int, torch.Tensor]]:
    model.module.eval()
    for part in physical_batches(examples, examples.units(by_person=False), _BATCH):
        indices = [index for unit in part for index in unit]
        batch = model.task.collate(examples, indices).to(model.device)
        result = model.task.judge(model.module, batch).double().cpu()
        yield from zip(indices, result, strict=True)


def _content(examples: Encoded, index: int) -> bytes:
    """Returns what tells a record apart, with its label: of a text where it begins."""
    label = examples.labels[index].numpy().tobytes()
    return label + examples.inputs[index].numpy().tobytes()


def log_odds(model: TaskModel, state: Tensors, examples: Encoded) -> torch.Tensor:
    """Returns how sure a model is of each record's label, shape ``(records,)``.

    ``log p / (1 - p)`` of the probability of the label: by logits, so that a model that
    is very sure stays comparable. With several labels, the mean over them. For a text,
    p is the geometric mean of the probabilities of its completion's tokens.

    Source: Carlini et al. (2022), LiRA, section IV-C.
    """
    result = judged(model, state, examples)
    if not isinstance(model.task, Classification):
        loss = (result[:, 0] / result[:, 1].clamp(min=1)).clamp(min=1e-12)
        return -loss - torch.log(-torch.expm1(-loss))
    if examples.labels.dim() == 2:
        return (result * (2 * examples.labels - 1)).mean(1)
    labels = examples.labels[:, None]
    others = result.scatter(1, labels, -torch.inf).logsumexp(1)
    return result.gather(1, labels)[:, 0] - others


def probabilities(odds: torch.Tensor) -> torch.Tensor:
    """Returns p of its log odds.

    >>> probabilities(torch.zeros(1))
    tensor([0.5000])
    """
    return F.sigmoid(odds)
