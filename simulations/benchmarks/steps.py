"""Training steps to compare: without privacy, ours, and Opacus' three modes.

Every step ends in plain SGD; the private ones clip by example and add noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from fedpeft.privacy import DpSgd, Randomness
from fedpeft.privacy.randomness import noised
from simulations.benchmarks.shapes import Case

CLIPPING_NORM = 1.0
_LEARNING_RATE = 1e-4

StepFn: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What a step is measured under.

    Attributes:
        noise_multiplier: unitless.
        precision: of the forward pass, ``fp32`` or ``bf16``.
        randomness: of our noise.
    """

    noise_multiplier: float
    precision: str
    randomness: Randomness

    def autocast(self, case: Case) -> torch.autocast:
        """Returns the context of the forward pass."""
        is_half = self.precision == "bf16"
        return torch.autocast(case.inputs.device.type, torch.bfloat16, enabled=is_half)


def non_private(case: Case, setting: Setting) -> StepFn:
    """The mean gradient by autograd."""
    optimizer = sgd(case)

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast(case):
            loss = F.cross_entropy(case.model(case.inputs), case.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(case: Case, setting: Setting) -> StepFn:
    """The step of a private run, with the noise of one."""
    engine = DpSgd(CLIPPING_NORM, setting.noise_multiplier, len(case.labels))
    engine.bind(case.model, case.operations)
    optimizer = sgd(case)

    def noise(total: torch.Tensor, standard_deviation: float) -> torch.Tensor:
        return noised(total, standard_deviation, setting.randomness)

    def step() -> None:
        with setting.autocast(case):
            logits = case.model(case.inputs)
            losses = F.cross_entropy(logits, case.labels, reduction="none")
        engine.accumulate(losses)
        engine.step(noise)
        optimizer.step()

    return step


def sgd(case: Case) -> torch.optim.SGD:
    """Returns the optimiser that all steps share."""
    return torch.optim.SGD(case.parameters, _LEARNING_RATE)


def _opacus(mode: str) -> Callable[[Case, Setting], StepFn]:
    def make(case: Case, setting: Setting) -> StepFn:
        # Here, because our own steps can be measured where Opacus is not installed.
        from simulations.benchmarks.opacus_steps import opacus_step

        return opacus_step(mode, case, setting)

    return make


ENGINES: dict[str, Callable[[Case, Setting], StepFn]] = {
    "ours": ours,
    "hooks": _opacus("hooks"),
    "ghost": _opacus("ghost"),
    "functorch": _opacus("functorch"),
}
