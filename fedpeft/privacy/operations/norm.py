"""Trainable gain, and bias if there is one, of LayerNorm and RMSNorm."""

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward, sum_positions
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``dgain = sum_t g_t * x_hat_t`` and ``dbias = sum_t g_t``.

    x-hat is the input with its scale (and for LayerNorm its mean) removed. What is kept
    for the backward pass is what the plain layer keeps.

    Shapes: x ``(batch, features)`` or ``(batch, ..., features)``.

    Raises:
        ValueError: for a module that computes anything else, for example with a gain of
            ``1 + weight``.
    """
    module = operation.module
    if operation.parameters["weight"].dim() == 1:
        computes = type(module).forward
        if isinstance(module, nn.LayerNorm) and computes is nn.LayerNorm.forward:
            return _layer_norm(module, operation, rows)
        if isinstance(module, nn.RMSNorm) and computes is nn.RMSNorm.forward:
            return _rms_norm(module, operation, rows)
        if _is_rms_norm_of_transformers(module):
            return _keeping(module.variance_epsilon, operation, rows)  # type: ignore[arg-type]
    raise ValueError(
        f"Expected LayerNorm or RMSNorm over one dimension, got "
        f"{type(module).__name__}, which computes something else."
    )


def _layer_norm(module: nn.LayerNorm, operation: Operation, rows: Rows) -> Forward:
    """Keeps the input, its means and its scales."""
    weight, bias = operation.parameters["weight"], operation.parameters.get("bias")

    def write(
        gradient: torch.Tensor,
        x: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
    ) -> None:
        # In place: three passes over the activations are all that this costs.
        product = (x - mean).mul_(gradient).mul_(scale)
        rows.write(weight, sum_positions(product))
        if bias is not None:
            rows.write(bias, sum_positions(gradient))

    def apply(x: torch.Tensor) -> torch.Tensor:
        shift = None if module.bias is None else module.bias.detach()
        y, mean, scale = torch.native_layer_norm(
            x, list(module.normalized_shape), weight.detach(), shift, module.eps
        )
        return tap(y, weight, write, x, mean, scale)

    return apply


def _rms_norm(module: nn.RMSNorm, operation: Operation, rows: Rows) -> Forward:
    """Keeps the input and finds x-hat again."""
    weight, shape = operation.parameters["weight"], list(module.normalized_shape)

    def write(gradient: torch.Tensor, x: torch.Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, gradient.dtype))
        x_hat = F.rms_norm(x, shape, None, module.eps)
        rows.write(weight, sum_positions(x_hat.mul_(gradient)))

    def apply(x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x, shape, weight.detach(), module.eps)
        return tap(y, weight, write, x)

    return apply


def _keeping(epsilon: float, operation: Operation, rows: Rows) -> Forward:
    """Keeps x-hat, as the plain layer does for the gradient of its gain."""
    weight = operation.parameters["weight"]

    def write(gradient: torch.Tensor, x_hat: torch.Tensor) -> None:
        rows.write(weight, sum_positions(gradient * x_hat))

    def apply(x: torch.Tensor) -> torch.Tensor:
        x_hat = _without_scale(x, epsilon)
        return tap(weight.detach() * x_hat, weight, write, x_hat)

    return apply


def _is_rms_norm_of_transformers(module: nn.Module) -> bool:
    """Tells by what the module computes: there is one class an architecture."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(epsilon, float):
        return False
    line = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    x = torch.stack((line, epsilon**0.5 * line))  # in the second, epsilon counts
    with torch.no_grad():
        return torch.allclose(module(x), weight * _without_scale(x, epsilon))


def _without_scale(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Returns x-hat with the intermediate precision of transformers' classes."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return (wide * torch.rsqrt(variance + epsilon)).to(x.dtype)
