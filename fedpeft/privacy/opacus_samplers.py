"""Our operations' per-sample rules in the form that Opacus takes.

For whoever trains with Opacus and wants our methods there::

    operations = SSF().attach(backbone)
    register_opacus_samplers(operations)
    PrivacyEngine().make_private(module=model, ...)

Opacus keeps one rule a class, in a register of the process.
"""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from torch import nn
from torch.func import functional_call

from fedpeft.interfaces import Operation, OperationKind
from fedpeft.privacy.operations._forward import sum_positions

Samples: TypeAlias = dict[nn.Parameter, torch.Tensor]
"""Parameter -> per-sample gradients, shape ``(batch, *parameter.shape)``."""

Sampler: TypeAlias = Callable[[nn.Module, list[torch.Tensor], torch.Tensor], Samples]
"""``sampler(module, inputs, gradient of its output)``."""


def register_opacus_samplers(operations: Iterable[Operation]) -> None:
    """Tells Opacus the rules of those operations whose modules it does not know.

    **Guarantees**: under Opacus' modes ``hooks`` and ``ghost``, these modules'
    per-sample gradients equal the one-example loop's. Rules that Opacus or its user has
    registered stay as they are, but for that of a LayerNorm without a bias, which
    fails.

    Raises:
        ValueError: for virtual tokens: Opacus cannot watch a module that sees no
            example, and would take a prompt for a batch of one.
    """
    for operation in operations:
        module = operation.module
        if operation.kind == "tokens":
            raise ValueError(
                f"Expected modules that see the examples, got {type(module).__name__} "
                "of kind tokens: train it with our own engine."
            )
        if operation.kind in _SAMPLERS and not is_known_to_opacus(module):
            register_grad_sampler(type(module))(_SAMPLERS[operation.kind])


def is_known_to_opacus(module: nn.Module) -> bool:
    """Returns whether Opacus has a rule for the module, and one that works."""
    if isinstance(module, nn.LayerNorm) and module.bias is None:
        return False  # it takes a bias for granted
    return type(module) in GradSampleHooks.GRAD_SAMPLERS


def _scale_shift(
    module: nn.Module, inputs: list[torch.Tensor], gradient: torch.Tensor
) -> Samples:
    """``dscale = sum_t g_t * y_t`` and ``dshift = sum_t g_t``."""
    parameters = dict(module.named_parameters(recurse=False))
    # An einsum over the diagonal says the same and takes ten times as long.
    samples = {parameters["scale"]: sum_positions(gradient * inputs[0])}
    if "shift" in parameters:
        samples[parameters["shift"]] = sum_positions(gradient)
    return samples


def _norm(
    module: nn.Module, inputs: list[torch.Tensor], gradient: torch.Tensor
) -> Samples:
    """``dgain = sum_t g_t * x_hat_t`` and ``dbias = sum_t g_t``.

    Every norm's output is ``gain * x_hat + rest``: x-hat is what a gain of one adds to
    a gain of zero, whichever way the class computes it.
    """
    parameters = dict(module.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
    ones = {**zeros, "weight": torch.ones_like(weight)}
    with torch.no_grad():
        x_hat = functional_call(module, ones, inputs[0])
        x_hat = x_hat - functional_call(module, zeros, inputs[0])
    samples = {weight: sum_positions(gradient * x_hat)}
    if bias is not None:
        samples[bias] = sum_positions(gradient)
    return samples


_SAMPLERS: dict[OperationKind, Sampler] = {
    "scale_shift": _scale_shift,
    "norm": _norm,
}
