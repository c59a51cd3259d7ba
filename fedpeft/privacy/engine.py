"""The step of DP-SGD, and its non-private counterpart."""

import math
from collections import Counter

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft.interfaces import NoiseFn, Operation, PrivacyEngine
from fedpeft.privacy.operations import RULES
from fedpeft.privacy.per_sample import Rows

SLACK = {"fp32": 1e-5, "bf16": 1e-2}
"""Share of the clipping norm kept free, by the precision of the forward pass.

One more example changes padding and chunks, hence the rounding of all others' gradients
(Casacuberta et al. 2022, section 5). Measured on 129 reviews and MiniLM, the other 128
together move by 0.005 of the norm in bf16 and by 2e-6 in fp32. A measured reserve is
not a proof, in either precision.
"""


class DpSgd(PrivacyEngine):
    """Clips each example's gradient, sums, adds noise once a step.

    **Guarantees**: adding or removing one example changes the sum of a step by at most
    `clipping_norm` in L2 norm over all trainable parameters together, in real numbers;
    `slack` makes room for what rounding adds, see :data:`SLACK`. The noise has
    standard deviation ``noise_multiplier * clipping_norm`` on that sum. An example
    whose gradient is not finite contributes exactly zero, and changes no other
    example's part. Not guaranteed here: the sampling of the batches (see ``Release``)
    and a model that mixes examples by itself (batch normalisation).

    Source: Abadi et al. (2016), Algorithm 1.

    Args:
        clipping_norm: L2 bound of one example's gradient; infinity clips nothing.
        noise_multiplier: unitless; 0 adds nothing.
        nominal_batch: the divisor, a public constant; not the batch's own size.
        slack: share of the clipping norm that is kept free for rounding, see
            :data:`SLACK`.
    """

    def __init__(
        self,
        clipping_norm: float,
        noise_multiplier: float,
        nominal_batch: int,
        *,
        slack: float = 1e-5,
    ) -> None:
        self._bound = clipping_norm * (1 - slack)
        self._deviation = noise_multiplier * clipping_norm if noise_multiplier else 0.0
        self._nominal_batch = nominal_batch
        self._parameters: list[nn.Parameter] = []
        self._rows = Rows([])
        self._sum = torch.zeros(0)

    def bind(self, model: nn.Module, operations: list[Operation]) -> None:
        """Puts a tap on the output of every operation's module, in place."""
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise ValueError(
                "Expected a model without batch normalisation: it mixes examples."
            )
        names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        covered = Counter(p for op in operations for p in op.parameters.values())
        for parameter, name in names.items():
            if covered[parameter] != 1:
                raise ValueError(
                    f"Expected each trainable parameter in exactly one operation, "
                    f"{name} is in {covered[parameter]}: its gradient could not be "
                    f"clipped by example."
                )
        if len(covered) != len(names):
            raise ValueError("Expected operations to name trainable parameters only.")
        self._parameters = list(names)
        self._rows = Rows(self._parameters)
        self._sum = torch.zeros(self._rows.total, device=self._parameters[0].device)
        for operation in operations:
            rule = RULES[operation.kind]
            operation.module.forward = rule(operation, self._rows)

    def reset(self) -> None:
        """Empties the step's sum."""
        self._sum.zero_()

    def per_sample_gradients(self, losses: torch.Tensor) -> torch.Tensor:
        """Runs backward and returns one row an example, shape ``(batch, total)``.

        The columns are the trainable parameters in the model's order. The rows are
        valid until the next call.
        """
        self._rows.start(losses.shape[0], self._sum.device)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return self._rows.finish()

    def accumulate(self, losses: torch.Tensor) -> None:
        """Adds the batch's clipped rows to the step's sum."""
        rows = self.per_sample_gradients(losses)
        self._sum += clipped_sum(rows, self._bound)

    def step(self, noise: NoiseFn) -> None:
        """Sets every trainable parameter's ``.grad`` to noised sum / nominal batch."""
        gradient = noise(self._sum, self._deviation) / self._nominal_batch
        sizes = [parameter.numel() for parameter in self._parameters]
        parts = zip(self._parameters, torch.split(gradient, sizes), strict=True)
        for parameter, part in parts:
            parameter.grad = part.view(parameter.shape)
        self.reset()


def clipped_sum(rows: torch.Tensor, bound: float) -> torch.Tensor:
    """Returns the sum of rows, each scaled down to L2 norm `bound` if it is longer.

    **Guarantees**: each row's part is at most `bound` long, up to the rounding of a
    single-precision norm, which is below 1e-5 of it. A row with a non-finite value or
    norm is zeroed (in place).

    Shapes: rows ``(batch, total)`` -> ``(total,)``.

    >>> clipped_sum(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    tensor([0.9000, 1.2000])
    """
    norms = torch.linalg.vector_norm(rows, dim=1)
    finite = norms.isfinite()
    if not finite.all():
        rows[~finite] = 0.0
        norms = norms.where(finite, 0.0)
    if math.isinf(bound):
        return rows.sum(0)
    return torch.mv(rows.t(), (bound / norms).clamp(max=1.0))


class NonPrivate(PrivacyEngine):
    """Plain mini-batch training: the examples' mean gradient, no clip, no noise."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._num_examples = 0

    def bind(self, model: nn.Module, operations: list[Operation]) -> None:
        """Notes the trainable parameters."""
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def reset(self) -> None:
        """Forgets the examples seen and their gradients."""
        self._num_examples = 0
        for parameter in self._parameters:
            parameter.grad = None

    def accumulate(self, losses: torch.Tensor) -> None:
        """Runs backward; autograd sums into ``.grad``."""
        self._num_examples += losses.shape[0]
        losses.sum().backward()  # type: ignore[no-untyped-call]

    def step(self, noise: NoiseFn) -> None:
        """Divides by the number of examples seen; `noise` is not used."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad /= max(1, self._num_examples)
        self._num_examples = 0
