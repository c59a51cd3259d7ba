"""The step of DP-SGD, and its non-private counterpart."""

from collections import Counter

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedpeft.interfaces import NoiseFn, Operation, PrivacyEngine
from fedpeft.privacy.per_sample import GradientSource
from fedpeft.privacy.rows import clipped_sum
from fedpeft.privacy.taps import Taps

SLACK = {"fp32": 1e-5, "bf16": 1e-2}
"""Share of the clipping norm kept free, by the precision of the forward pass.

One more example changes padding and chunks, hence the rounding of all others' gradients
(Casacuberta et al. 2022, section 5). Measured on 129 reviews and MiniLM, the other 128
together move by 0.005 of the norm in bf16 and by 2e-6 in fp32. A measured reserve is
not a proof, in either precision.
"""


class DpSgd(PrivacyEngine):
    """Clips each example's gradient, or each owner's sum, and adds noise once a step.

    **Guarantees**: adding or removing one example (with all of an owner's examples in
    one batch: one owner) changes the sum of a step by at most `clipping_norm` in L2
    norm over all trainable parameters together, in real numbers;
    `slack` makes room for what rounding adds, see :data:`SLACK`. The noise has
    standard deviation ``noise_multiplier * clipping_norm`` on that sum. An example
    whose gradient is not finite contributes exactly zero, and changes no other
    example's part. Not guaranteed here: the sampling of the batches (see ``Release``)
    and a model that mixes examples by itself (batch normalisation).

    Source: Abadi et al. (2016), Algorithm 1.

    Args:
        clipping_norm: L2 bound of one unit's contribution; infinity clips nothing.
        noise_multiplier: unitless; 0 adds nothing.
        nominal_batch: the divisor, a public constant; not the batch's own size.
        slack: share of the clipping norm that is kept free for rounding, see
            :data:`SLACK`.
        source: of the per-sample gradients; None takes our taps.
    """

    def __init__(
        self,
        clipping_norm: float,
        noise_multiplier: float,
        nominal_batch: int,
        *,
        slack: float = 1e-5,
        source: GradientSource | None = None,
    ) -> None:
        self._bound = clipping_norm * (1 - slack)
        self._deviation = noise_multiplier * clipping_norm if noise_multiplier else 0.0
        self._nominal_batch = nominal_batch
        self._source = source or Taps()
        self._parameters: list[nn.Parameter] = []
        self._sum: torch.Tensor | None = None

    def bind(self, model: nn.Module, operations: list[Operation]) -> None:
        """Lets the source of per-sample gradients prepare the model, in place."""
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
        self._source.bind(model, operations)
        self._parameters = list(names)
        self.reset()

    def reset(self) -> None:
        """Empties the step's sum."""
        self._sum = None

    def per_sample_gradients(self, losses: torch.Tensor) -> torch.Tensor:
        """Runs backward and returns one row an example, shape ``(batch, total)``.

        The columns are the trainable parameters in the model's order. The rows are
        valid until the next call.
        """
        return self._source.backward(losses).dense()

    def accumulate(
        self, losses: torch.Tensor, owners: torch.Tensor | None = None
    ) -> None:
        """Adds the batch's clipped rows to the step's sum."""
        rows = self._source.backward(losses)
        if owners is None:
            total = rows.clipped_sum(self._bound)
        else:
            total = clipped_sum(summed_by(owners, rows.dense()), self._bound)
        # In double precision: thousands of aligned examples must not sum to more.
        total = total.double()
        self._sum = total if self._sum is None else self._sum.add_(total)

    def step(self, noise: NoiseFn) -> None:
        """Sets every trainable parameter's ``.grad`` to noised sum / nominal batch."""
        sizes = [parameter.numel() for parameter in self._parameters]
        total = self._sum
        if total is None:  # an empty batch
            device = self._parameters[0].device
            total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        gradient = noise(total, self._deviation).float() / self._nominal_batch
        parts = zip(self._parameters, torch.split(gradient, sizes), strict=True)
        for parameter, part in parts:
            parameter.grad = part.view(parameter.shape)
        self.reset()


def summed_by(owners: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns one row an owner: the sum of the owner's rows.

    Shapes: owners ``(batch,)`` from 0, rows ``(batch, total)`` -> ``(owners, total)``.

    >>> summed_by(torch.tensor([0, 1, 0]), torch.tensor([[1.0], [2.0], [4.0]]))
    tensor([[5.],
            [2.]])
    """
    num_owners = int(owners.max()) + 1
    sums = torch.zeros(num_owners, rows.shape[1], device=rows.device)
    return sums.index_add_(0, owners.to(rows.device), rows)


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

    def accumulate(
        self, losses: torch.Tensor, owners: torch.Tensor | None = None
    ) -> None:
        """Runs backward; autograd sums into ``.grad``, whosever the examples are."""
        self._num_examples += losses.shape[0]
        losses.sum().backward()  # type: ignore[no-untyped-call]

    def step(self, noise: NoiseFn) -> None:
        """Divides by the number of examples seen; `noise` is not used."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad /= max(1, self._num_examples)
        self._num_examples = 0
