"""The DP audit: experiments against the claimed epsilon, with canaries alone.

All that follows a forward pass is the code that clients run: Poisson batches, taps,
clipping, noise, release, ledger. The model alone is another one, see
:mod:`fedpeft.audit.canaries`.
"""

import time

from fedpeft.audit.canaries import tensor_sizes
from fedpeft.audit.results import Check, DpTrial
from fedpeft.audit.trials.checks import (
    hiding_check,
    ledger_checks,
    noise_check,
)
from fedpeft.audit.trials.deciding import FAMILY_ALPHA
from fedpeft.audit.trials.mechanisms import randomness
from fedpeft.audit.trials.samples import mislabelled, sample_runs
from fedpeft.audit.trials.steps import num_step_trials, step_trials
from fedpeft.audit.trials.whole_run import num_run_trials, server_run, whole_runs
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.model import TaskModel
from fedpeft.privacy import Plan, make_plan

__all__ = [
    "FAMILY_ALPHA",
    "LIMITATIONS",
    "dp_trials",
    "hiding_check",
    "ledger_checks",
    "mislabelled",
]

LIMITATIONS = (
    "Gradient canaries replace the model. Sample canaries train it, but their bound is "
    "loose: that the per-sample gradients of its own layers are right is shown by "
    "`fedpeft doctor`, which compares them with a loop over single examples.",
    "Noise that is correlated over rounds and clipping norms that adapt are tested one "
    "round at a time, with independent noise and the first norm.",
    "Cohorts of a fixed size have another neighbouring relation; no whole run of them "
    "is tried.",
    "What a run publishes beside its updates and models, such as metrics, is seen by "
    "no canary.",
)
"""What no trial looks at, in sentences for the report."""

_RUN_SHARE = 0.2
_STEP_TENSORS = 3
_STEP_VALUES = 48
_RUN_VALUES = 8192


def dp_trials(
    config: RunConfig,
    model: TaskModel,
    *,
    seconds: float = 60.0,
    seed: int = 0,
    samples: Encoded | None = None,
) -> tuple[list[DpTrial], list[Check]]:
    """Tries to refute the epsilon that a configuration claims.

    **Guarantees**: a correct implementation is refuted with a probability of at most
    :data:`FAMILY_ALPHA`, in any of the trials of one call; half of it is for single
    releases, half for whole runs.

    Args:
        config: of the run.
        model: the run's own; its trainable tensors' sizes are looked at.
        seconds: to spend. With less than 20 on a busy machine there are fewer than a
            few hundred releases a trial, and small violations pass.
        seed: of canaries and coins. Noise is drawn as the configuration says.
        samples: public examples that become canaries in a copy of the model, with a
            fifth of `seconds` on top; a round that has begun is finished. Only where
            clients train by DP-SGD.

    Returns:
        Trials, those of single releases first, and checks; neither without privacy.
    """
    plan = make_plan(config)
    if plan is None:
        return [], []
    end = time.monotonic() + seconds
    noises = [randomness(config, seed, "noise", number) for number in (1, 2)]
    runs, facts = _runs(config, plan, model, _RUN_SHARE * seconds, seed)
    steps = step_trials(
        config,
        plan,
        tensor_sizes(model, most=_STEP_VALUES, tensors=_STEP_TENSORS),
        seconds=end - time.monotonic(),
        seed=seed,
        alpha=FAMILY_ALPHA / 2 / num_step_trials(plan),
    )
    if samples is not None and plan.is_dp_sgd:
        trained, failed = sample_runs(
            config,
            plan,
            model,
            samples,
            seconds=_RUN_SHARE * seconds,
            seed=seed,
            alpha=_run_alpha(plan),
        )
        runs, facts = [*runs, *trained], [*facts, *failed]
    return [*steps, *runs], [noise_check(*noises), *facts]


def _runs(
    config: RunConfig,
    plan: Plan,
    model: TaskModel,
    seconds: float,
    seed: int,
) -> tuple[list[DpTrial], list[Check]]:
    """Returns the trials of whole runs, and what their ledgers say."""
    sizes = tensor_sizes(model, most=_RUN_VALUES)
    alpha = _run_alpha(plan)
    if not plan.is_dp_sgd:
        if plan.sampling == "fixed" or plan.bands is not None:
            return [], []
        found = server_run(config, plan, sizes, seconds=seconds, seed=seed, alpha=alpha)
        return found, []
    return whole_runs(config, plan, sizes, seconds=seconds, seed=seed, alpha=alpha)


def _run_alpha(plan: Plan) -> float:
    return FAMILY_ALPHA / 2 / num_run_trials(plan)
