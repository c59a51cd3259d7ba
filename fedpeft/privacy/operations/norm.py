"""Trainable gain, and bias if there is one, of LayerNorm and RMSNorm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward, sum_positions
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows

_Norm = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: ``dgain = sum_t g_t * x_hat_t`` and ``dbias = sum_t g_t``.

    x-hat is the input with its scale (and for LayerNorm its mean) removed.

    Shapes: x ``(batch, features)`` or ``(batch, ..., features)``.

    Raises:
        ValueError: for a module that computes anything else, for example with a gain of
            ``1 + weight``.
    """
    module = operation.module
    if operation.parameters["weight"].dim() == 1:
        if (norm := _norm_of_torch(module)) is not None:
            return _recomputing(norm, operation, rows)
        if _is_rms_norm_of_transformers(module):
            return _keeping(module.variance_epsilon, operation, rows)  # type: ignore[arg-type]
    raise ValueError(
        f"Expected LayerNorm or RMSNorm over one dimension, got "
        f"{type(module).__name__}, which computes something else."
    )


def _recomputing(norm: _Norm, operation: Operation, rows: Rows) -> Forward:
    """Keeps the input, as the plain layer does, and finds x-hat again in backward."""
    weight, bias = operation.parameters["weight"], operation.parameters.get("bias")
    constant = getattr(operation.module, "bias", None)

    def write(gradient: torch.Tensor, x: torch.Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, gradient.dtype))
        rows.write(weight, sum_positions(norm(x, None, None).mul_(gradient)))
        if bias is not None:
            rows.write(bias, sum_positions(gradient))

    def apply(x: torch.Tensor) -> torch.Tensor:
        shift = None if constant is None else constant.detach()
        return tap(norm(x, weight.detach(), shift), weight, write, x)

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


def _norm_of_torch(module: nn.Module) -> _Norm | None:
    computes = type(module).forward
    if isinstance(module, nn.LayerNorm) and computes is nn.LayerNorm.forward:
        shape, epsilon = list(module.normalized_shape), module.eps
        return lambda x, gain, shift: F.layer_norm(x, shape, gain, shift, epsilon)
    if isinstance(module, nn.RMSNorm) and computes is nn.RMSNorm.forward:
        size, smallest = list(module.normalized_shape), module.eps
        return lambda x, gain, _: F.rms_norm(x, size, gain, smallest)
    return None


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
