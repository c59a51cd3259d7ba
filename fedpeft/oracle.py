"""The slow, obvious reference for per-sample gradients: one loss at a time."""

import torch
from torch import nn


def loop_gradients(
    losses: torch.Tensor, parameters: list[nn.Parameter]
) -> torch.Tensor:
    """Returns each loss's gradient by plain autograd, one backward pass an example.

    The losses come from one forward pass of a model without taps, so that dropout masks
    are those of the batch.

    Shapes: losses ``(batch,)`` -> ``(batch, total)``.
    """
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
        pairs = zip(gradients, parameters, strict=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1)
                    for g, p in pairs
                ]
            )
        )
    return torch.stack(rows)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ``||actual - expected|| / ||expected||``, in double precision."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))
