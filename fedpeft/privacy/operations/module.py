"""Any module that treats its examples apart: the rule for what has none of its own."""

from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap

from fedpeft.interfaces import Operation
from fedpeft.privacy.operations._forward import Forward
from fedpeft.privacy.per_sample import tap
from fedpeft.privacy.rows import Rows


class _Whole(nn.Module):
    """The module as its class defines it: without the tap of an earlier bind."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", type(self.module).forward(self.module, *inputs))


def forward(operation: Operation, rows: Rows) -> Forward:
    """Per sample: the module is run again in the backward pass, each example alone.

    Exact for whatever the module computes, if it treats its examples apart, and the
    slowest rule: a second forward pass, and intermediate gradients an example where the
    module works on whole weights. The operation's parameters go by their names within
    the module. Under autocast the second pass computes as the first did.

    Shapes: inputs ``(batch, ...)``, all of them tensors -> ``(batch, ...)``.

    Raises:
        ValueError: for a module with dropout: its second pass would draw other masks.
    """
    module, parameters = operation.module, operation.parameters
    _check(module, parameters)
    whole, anchor = _Whole(module), next(iter(parameters.values()))

    def constants() -> dict[str, torch.Tensor]:
        return {f"module.{name}": p.detach() for name, p in parameters.items()}

    def write(
        mode: AbstractContextManager[None],
        gradient: torch.Tensor,
        inputs: tuple[torch.Tensor, ...],
    ) -> None:
        def pull(
            gradient: torch.Tensor, *example: torch.Tensor
        ) -> dict[str, torch.Tensor]:
            def output(values: dict[str, torch.Tensor]) -> torch.Tensor:
                alone = tuple(part.unsqueeze(0) for part in example)
                return cast("torch.Tensor", functional_call(whole, values, alone)[0])

            pull_back = vjp(output, constants())[1]
            return cast("dict[str, torch.Tensor]", pull_back(gradient)[0])

        with mode:
            gradients = vmap(pull)(gradient, *inputs)
        for name, parameter in parameters.items():
            rows.write(parameter, gradients[f"module.{name}"])

    def apply(*inputs: torch.Tensor) -> torch.Tensor:
        mode = _autocast_as_now(inputs[0].device.type)
        y = functional_call(whole, constants(), inputs)
        return tap(y, anchor, lambda g, *saved: write(mode, g, saved), *inputs)

    return apply


def _check(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    named = dict(module.named_parameters())
    if any(named.get(name) is not p for name, p in parameters.items()):
        raise ValueError(
            f"Expected parameters by their names within {type(module).__name__}, got "
            f"{', '.join(parameters)}."
        )
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            raise ValueError(
                f"Expected {type(module).__name__} without dropout, got p = {part.p}: "
                "its gradients would be those of another mask."
            )


def _autocast_as_now(device: str) -> AbstractContextManager[None]:
    """Without the cache of casts: what it kept would outlive the transform."""
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )
