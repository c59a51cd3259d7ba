"""Opacus' training steps, by its own classes alone."""

import torch.nn.functional as F
from opacus.grad_sample import prepare_module
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from fedpeft.privacy.opacus_samplers import register_opacus_samplers
from simulations.benchmarks.shapes import Case
from simulations.benchmarks.steps import CLIPPING_NORM, Setting, StepFn, sgd


def opacus_step(mode: str, case: Case, setting: Setting) -> StepFn:
    """Returns a step of mode ``hooks``, ``functorch`` or ``ghost``.

    Our methods' layers take part by the rules that we register.
    """
    register_opacus_samplers(case.operations)
    noise = {
        "noise_multiplier": setting.noise_multiplier,
        "max_grad_norm": CLIPPING_NORM,
        "expected_batch_size": len(case.labels),
    }
    if mode == "ghost":
        return _ghost(case, setting, noise)
    model = prepare_module(case.model, mode)
    optimizer = DPOptimizer(sgd(case), **noise)

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast(case):
            loss = F.cross_entropy(model(case.inputs), case.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _ghost(case: Case, setting: Setting, noise: dict[str, float]) -> StepFn:
    model = prepare_module(case.model, "ghost", max_grad_norm=CLIPPING_NORM)
    optimizer = DPOptimizerFastGradientClipping(sgd(case), **noise)
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast(case):
            loss = criterion(model(case.inputs), case.labels)
        loss.backward()
        optimizer.step()

    return step
