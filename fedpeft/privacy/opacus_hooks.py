"""Per-sample gradients by Opacus' rules: the source for layers ours does not know.

The rules are those of Opacus' mode ``hooks``; what calls them is a tap. Opacus' own
hooks record nothing while a model is in evaluation mode, which is how a backbone
without dropout is trained here; they take a layer under activation checkpointing for
two, and after one interrupted forward pass their counts are wrong for good. A tap has
no state.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.privacy.opacus_samplers import Sampler, Samples, is_known_to_opacus
from fedpeft.privacy.operations import RULES, Forward
from fedpeft.privacy.per_sample import GradientSource, tap
from fedpeft.privacy.rows import Rows

_TOLERANCE = 1e-4


class OpacusHooks(GradientSource):
    """Opacus' rules for the layers that it knows, ours for all others.

    **Guarantees**: a layer without a rule is refused at :meth:`bind`. At a layer's
    first backward pass Opacus' rule for it is compared with the one-example loop, on
    random numbers of the shapes that the layer sees: a rule that overlooks one of the
    layer's settings (for a circular convolution it does) is refused, not used. Names in
    the model's state stay as they are; binding again replaces the former taps.
    """

    def __init__(self) -> None:
        self._rows = Rows([])

    def bind(self, model: nn.Module, operations: list[Operation]) -> None:
        """Puts the taps.

        Raises:
            ValueError: for a layer that neither Opacus nor we have a rule for.
        """
        names = {module: name for name, module in model.named_modules()}
        self._rows = Rows(p for p in model.parameters() if p.requires_grad)
        forwards: list[Forward] = []
        for operation in operations:
            module = operation.module
            if isinstance(module, nn.Embedding):  # Opacus overlooks its settings
                forwards.append(RULES["embedding"](operation, self._rows))
            elif is_known_to_opacus(module):
                forwards.append(_Layer(operation).tapped(self._rows))
            elif operation.kind in RULES:
                forwards.append(RULES[operation.kind](operation, self._rows))
            else:
                raise ValueError(
                    f"Expected layers that Opacus has a rule for, got {names[module]} "
                    f"({type(module).__name__}): register one by "
                    "opacus.grad_sample.register_grad_sampler."
                )
        for operation, forward in zip(operations, forwards, strict=True):
            operation.module.forward = forward

    def backward(self, losses: torch.Tensor) -> Rows:
        """Runs backward once."""
        self._rows.backward(losses)
        return self._rows


class _Layer:
    """One operation's module, its forward pass and Opacus' rule for it."""

    def __init__(self, operation: Operation) -> None:
        module = operation.module
        self._module = module
        self._parameters = list(operation.parameters.values())
        # As the class defines it: without the taps of an earlier bind.
        self._call = partial(type(module).forward, module)
        self._sampler: Sampler = GradSampleHooks.GRAD_SAMPLERS[type(module)]
        self._is_verified = False

    def tapped(self, rows: Rows) -> Forward:
        """Returns the forward pass with a tap on its output."""

        def write(gradient: torch.Tensor, *inputs: torch.Tensor) -> None:
            if not self._is_verified:
                self._verify(gradient, inputs)
                self._is_verified = True
            samples = self._samples(gradient, inputs)
            for parameter in self._parameters:
                rows.write(parameter, samples[parameter])

        def forward(*inputs: torch.Tensor) -> torch.Tensor:
            with _constant(self._parameters):
                output: torch.Tensor = self._call(*inputs)
            return tap(output, self._parameters[0], write, *inputs)

        return forward

    def _samples(
        self, gradient: torch.Tensor, inputs: Iterable[torch.Tensor]
    ) -> Samples:
        # Sums over positions in single precision, whatever the forward pass was in.
        inputs = [x.float() if x.is_floating_point() else x for x in inputs]
        return self._sampler(self._module, inputs, gradient.float())

    def _verify(self, gradient: torch.Tensor, inputs: Iterable[torch.Tensor]) -> None:
        """Compares the rule with plain autograd on two random examples."""
        rng = torch.Generator().manual_seed(0)
        gradient, *inputs = (_two_like(tensor, rng) for tensor in (gradient, *inputs))
        samples = self._samples(gradient, inputs)
        for row in (slice(0, 1), slice(1, 2)):
            with (
                torch.enable_grad(),
                torch.autocast(gradient.device.type, enabled=False),
            ):
                output = self._call(*(x[row] for x in inputs))
            expected = torch.autograd.grad(output, self._parameters, gradient[row])
            for parameter, value in zip(self._parameters, expected, strict=True):
                error = (samples[parameter][row] - value).norm()
                if not error <= _TOLERANCE * value.norm():  # NaN is wrong as well
                    raise ValueError(
                        f"Expected Opacus' rule to equal the one-example loop, got "
                        f"another gradient for {self._module}: it overlooks one of the "
                        "layer's settings."
                    )


@contextmanager
def _constant(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Keeps autograd from computing summed gradients, which nobody needs."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _two_like(tensor: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Returns two random examples; of indices, the first one, which always exists."""
    shape = (2, *tensor.shape[1:])
    if not tensor.is_floating_point():
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return torch.randn(shape, generator=rng).to(tensor.device)
