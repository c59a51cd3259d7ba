"""Scores of weights from public examples: which entries a mask should let train."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save
from torch import nn

from fedpeft.peft._pinned import read_pinned
from fedpeft.tensors import Tensors

Batch = TypeVar("Batch")
LossesFn = Callable[[Batch], torch.Tensor]
"""A batch -> one loss an example, shape ``(batch,)``, of a model with the backbone."""


def fisher_scores(
    backbone: nn.Module, batches: Iterable[Batch], losses: LossesFn[Batch]
) -> Tensors:
    """Returns the empirical Fisher information: squared gradients, summed by example.

    Of the weights of all linear layers, by name in the backbone.

    **Guarantees**: none of privacy. The examples must be public.

    Source: Sung et al. (2021), section 3.1.
    """
    return _squares(backbone, batches, losses)


def sensitivity_scores(
    backbone: nn.Module, batches: Iterable[Batch], losses: LossesFn[Batch]
) -> Tensors:
    """Returns squared gradients of the mean loss, summed by batch.

    Otherwise as :func:`fisher_scores`. Source: He et al. (2023), section 3.2.
    """
    return _squares(backbone, batches, lambda batch: losses(batch).mean()[None])


def _squares(
    backbone: nn.Module, batches: Iterable[Batch], losses: LossesFn[Batch]
) -> Tensors:
    weights = {
        f"{name}.weight": module.weight
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear)
    }
    trained = {name: weight.requires_grad for name, weight in weights.items()}
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for batch in batches:
            for loss in losses(batch):
                gradients = torch.autograd.grad(
                    loss, list(weights.values()), retain_graph=True, allow_unused=True
                )
                for score, gradient in zip(scores.values(), gradients, strict=True):
                    if gradient is not None:
                        score.addcmul_(gradient, gradient)
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(trained[name])
    return scores


def write_scores(scores: Tensors, path: str | Path) -> str:
    """Writes a file for ``[peft] public`` and returns its sha256."""
    content = save({name: score.contiguous().cpu() for name, score in scores.items()})
    Path(path).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_scores(
    path: str | Path, sha256: str, shapes: Mapping[str, torch.Size]
) -> Tensors:
    """Reads what :func:`write_scores` wrote; the file may hold more than is asked for.

    Raises:
        ValueError: if the file is missing or another, or if scores are missing, of
            another shape or not finite.
    """
    scores = read_pinned(path, sha256, "public scores")
    for name, shape in shapes.items():
        if name not in scores or scores[name].shape != shape:
            found = tuple(scores[name].shape) if name in scores else "none"
            raise ValueError(
                f"Expected scores of shape {tuple(shape)} for {name} in {path}, got "
                f"{found}: make them with this backbone."
            )
        if not scores[name].isfinite().all():
            raise ValueError(
                f"Expected finite scores for {name} in {path}, got others: make them "
                "again."
            )
    return {name: scores[name] for name in shapes}


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Marks the `count` highest scores; of equal ones, the first.

    >>> highest(torch.tensor([1.0, 3.0, 1.0, 2.0]), 3)
    tensor([ True,  True, False,  True])
    """
    least = scores.kthvalue(len(scores) - count + 1).values
    chosen = scores > least
    equal = (scores == least).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen
