"""Trains candidates as a client trains, to compare them: what ``search`` runs on.

A trial is a run of one round by one client: the client's own code samples, clips, adds
noise, compresses and commits it. On public data its ledger is thrown away; on a
client's own records it is that client's, and every trial is charged to it before
anybody sees what came of it.
"""

import dataclasses
import math
import secrets
import tempfile
import time
from pathlib import Path

import torch

from client.agreement import budget_in_force
from client.messages import TrainRequest
from client.site import Site, assemble
from client.update import make_update, open_randomness
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig
from fedpeft.data import physical_batches
from fedpeft.errors import ConfigError, FedpeftError, PrivacyBudgetExceeded
from fedpeft.evaluation import evaluate
from fedpeft.menus import check_variants
from fedpeft.model import build_model, shared_state, trainable_state
from fedpeft.privacy import (
    Plan,
    Question,
    admits,
    epsilon,
    make_plan,
    open_release,
    verify,
)
from fedpeft.search import Candidate, Trial
from fedpeft.tensors import flatten
from fedpeft.training import example_losses
from simulations.comparison import Comparison


def refusal(comparison: Comparison, candidate: Candidate) -> str:
    """Returns why a candidate cannot be trained here; empty if it can."""
    chosen = comparison.config.model_copy(update={"peft": candidate.peft})
    try:
        check_variants(chosen)  # of the whole run: a trial is one round
        _site(comparison, trial_config(comparison, candidate, steps=1))
    except ValueError as error:
        return str(error)
    return ""


def trial_config(
    comparison: Comparison,
    candidate: Candidate,
    steps: int,
    target_epsilon: float | None = None,
) -> RunConfig:
    """Returns the scenario as one round of so many local steps by one client.

    Args:
        comparison: whose scenario.
        candidate: takes the place of ``[peft]`` and of the learning rate.
        steps: for which the noise is calibrated.
        target_epsilon: of these steps; None for the scenario's.
    """
    config, training = comparison.config, comparison.config.training
    a_pass = config.nominal_units / training.batch_size
    if not config.is_private:
        num_examples = len(comparison.examples)
        a_pass = math.ceil(num_examples / min(training.batch_size, num_examples))
    sections = {
        "run": {"rounds": 1},
        "model": {"samples": ()},
        "training": {
            "local_epochs": steps / a_pass,
            "learning_rate": candidate.learning_rate,
        },
        "cohort": {"size": 1},
        "privacy": {
            "target_epsilon": target_epsilon or config.privacy.target_epsilon,
            "budget_epsilon": None,  # what is left of it the ledger knows
        },
    }
    changed = {
        name: getattr(config, name).model_copy(update=update)
        for name, update in sections.items()
    }
    return config.model_copy(update={**changed, "peft": candidate.peft})


def trial_plan(
    comparison: Comparison,
    candidate: Candidate,
    steps: int,
    target_epsilon: float | None = None,
) -> Plan | None:
    """Returns what a trial will release: the same for all candidates.

    Raises:
        ConfigError: if no noise reaches the target in so many steps.
    """
    try:
        return make_plan(trial_config(comparison, candidate, steps, target_epsilon))
    except ConfigError as error:
        raise ConfigError(f"{steps} steps of a trial: {error}") from None


def check_budget(comparison: Comparison, plan: Plan, trials: int) -> None:
    """Checks that a client's budget covers so many trials of one plan.

    Raises:
        PrivacyBudgetExceeded: if it does not: of a part of the candidates nothing could
            be chosen, and that part would be spent all the same.
    """
    assert comparison.state is not None
    entries = verify(comparison.state, comparison.source).entries
    history = [entry.composition for entry in entries]
    release = plan.composition(trials)
    budget = budget_in_force(comparison.config, None)
    if not admits(history, release, budget_epsilon=budget, delta=plan.target_delta):
        after = epsilon([*history, release], plan.target_delta)
        raise PrivacyBudgetExceeded(
            f"{comparison.source}: expected a budget that covers the {trials} trainings"
            f" of the first rung, after which its ledger would stand at epsilon "
            f"{after:.2f} ({plan.unit}, {plan.relation}), got {budget:g}: raise "
            "[privacy] budget_epsilon, lower target_epsilon, or bring fewer candidates."
            " Nothing was spent."
        )


def spent(comparison: Comparison) -> float:
    """Returns the epsilon of the client's ledger, earlier runs included."""
    assert comparison.state is not None
    delta = comparison.config.privacy.target_delta
    return verify(comparison.state, comparison.source).spent(delta)


def train(
    comparison: Comparison,
    candidate: Candidate,
    rung: int,
    steps: int,
    target_epsilon: float | None = None,
) -> Trial:
    """Trains a candidate from its start and judges it on public data.

    **Guarantees**: on a client's own records the training is charged to its ledger
    before it is judged, and, once its first batch is drawn, also if it fails. The
    metric and the size of the payload follow from what was charged for alone.

    Raises:
        PrivacyBudgetExceeded: if the budget does not cover it; nothing was trained.
    """
    site = _site(comparison, trial_config(comparison, candidate, steps, target_epsilon))
    config = site.config
    goal = config.privacy.target_epsilon if config.is_private else None
    values = flatten(trainable_state(site.model)).numel()
    trial = Trial(candidate, rung, steps, goal, None, 0, values)
    try:
        payload, seconds = _release(comparison, site)
    except FedpeftError:
        raise
    except ValueError as error:  # it diverged
        return dataclasses.replace(trial, failure=str(error))
    metrics = evaluate(site.model, comparison.judged, config.training.precision)
    value, loss = metrics[comparison.metric], _loss(comparison, site)
    if not math.isfinite(value + loss):
        reason = f"Expected finite values, got {comparison.metric} {value}, loss {loss}"
        return dataclasses.replace(trial, failure=f"{reason}.")
    return dataclasses.replace(
        trial,
        value=value,
        loss=loss,
        bytes_up=len(payload),
        step_seconds=None if comparison.state else seconds / steps,
    )


@torch.inference_mode()
def _loss(comparison: Comparison, site: Site) -> float:
    """Returns the mean loss of the judged examples."""
    judged, section = comparison.judged, site.config.training
    chunks = physical_batches(judged, judged.units(by_person=False), 64)
    rows = [[index for unit in chunk for index in unit] for chunk in chunks]
    losses = [example_losses(site.model, judged, row, section) for row in rows]
    return float(torch.cat(losses).mean())


def _release(comparison: Comparison, site: Site) -> tuple[bytes, float]:
    """Returns the payload, charged for, and how long the training took."""
    if comparison.state is None:
        with tempfile.TemporaryDirectory() as folder:
            budget = budget_in_force(site.config, None)
            return _commit(comparison, site, Path(folder), budget)
    budget = budget_in_force(comparison.config, None)
    return _commit(comparison, site, comparison.state, budget)


def _commit(
    comparison: Comparison, site: Site, state: Path, budget_epsilon: float
) -> tuple[bytes, float]:
    client, holding, request = comparison.client, site.holdings[0], _request(site)
    question = Question(request.run, request.server_round, request.hash)
    with (
        open_randomness(site, client, request.server_round) as randomness,
        open_release(
            state,
            holding.source,
            plan=site.plan,
            randomness=randomness,
            backbone=site.model.fingerprint,
            budget_epsilon=budget_epsilon,
        ) as release,
    ):
        release.authorise(question)
        start = time.perf_counter()
        try:
            payload, memory = make_update(site, client, holding, release, request)
        except Exception:
            release.forfeit(question)
            release.forget(request.run)
            raise
        seconds = time.perf_counter() - start
        answer = release.commit(question, payload.to_bytes(), memory)
        release.forget(request.run)  # nobody asks again
    return answer.payload, seconds


def _site(comparison: Comparison, config: RunConfig) -> Site:
    """Builds what a client process keeps warm, with these examples alone."""
    plan = make_plan(config)
    model = build_model(config, comparison.num_labels)
    parts = {comparison.source: comparison.examples}
    return assemble(config, plan, model, parts, is_own=True)


def _request(site: Site) -> TrainRequest:
    """Asks for the only round of a run that nobody else knows of."""
    dense = COMPRESSORS["dense"]()
    start = dense.compress(shared_state(site.model), torch.Generator())
    return TrainRequest(
        run=secrets.token_hex(8),
        server_round=1,
        config_hash=site.config.hash,
        plan_hash=site.plan.hash if site.plan else "",
        backbone=site.model.fingerprint,
        state=start.to_bytes(),
    )
