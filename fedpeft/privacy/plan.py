"""The plan: what a run will release, fixed before its first round.

A plan is a pure function of public constants, so that a client works it out for itself
and believes no server. Parameters that never change are what makes plain composition
valid against a server that adapts: whatever it sees, it cannot choose them.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.privacy.accountant import Composition, epsilon
from fedpeft.privacy.banded import best_bands
from fedpeft.privacy.calibration import (
    MAX_NOISE_MULTIPLIER,
    TargetOutOfReach,
    calibrate,
)
from fedpeft.privacy.client_level import split_noise
from fedpeft.sections import TrainingSection


@dataclass(frozen=True)
class Plan:
    """What one client releases, at most, in a whole run.

    For the units ``example`` and ``person`` a release is a noised step at the client;
    for ``client`` it is a noised round at the server.

    Attributes:
        unit: what one epsilon protects: one ``example``, ``person`` or ``client``.
        relation: the neighbouring relation of the epsilon.
        target_epsilon: what was asked, at `target_delta`.
        target_delta: in (0, 1).
        planned_epsilon: what `max_participations` cost; at most the target.
        noise_multiplier: unitless; the noise on a step's sum has standard deviation
            ``noise_multiplier * clipping_norm``.
        clipping_norm: L2 bound of one unit's contribution to a step's sum; the first
            one where it adapts.
        sampling: how units come into a step: ``poisson``, ``fixed`` (so many of all,
            without replacement), or a public ``rotation``, which amplifies nothing.
        sampling_rate: the share of the units that is in a step, on average; 1 in a
            rotation, which hides nobody.
        nominal_batch: the divisor of a step's sum, whatever the batch's real size.
        local_steps: noised steps a round.
        max_participations: rounds in which one client takes part, at most; where
            cohorts are secret all rounds, since they all speak of who was not in them.
        mechanism: ``gaussian``, or ``banded``: correlated over the rounds.
        bands: of the banded mechanism, which needs at least so many rounds from one
            participation of a client to the next; None for others.
        count_noise: standard deviation of the noise on the count that steers an
            adaptive clipping norm, inside `noise_multiplier`; None where it is fixed.
        max_examples: of one person in one step; None for other units.
    """

    unit: str
    relation: str
    target_epsilon: float
    target_delta: float
    planned_epsilon: float
    noise_multiplier: float
    clipping_norm: float
    sampling: Literal["poisson", "fixed", "rotation"]
    sampling_rate: float
    nominal_batch: int
    local_steps: int
    max_participations: int
    mechanism: Literal["gaussian", "banded"] = "gaussian"
    bands: int | None = None
    count_noise: float | None = None
    max_examples: int | None = None

    def composition(self, participations: int = 1) -> Composition:
        """Returns what a client has released after so many rounds.

        Banded noise costs what independent noise does, see :mod:`.banded`.

        >>> plan = Plan("example", "add-or-remove-one", 8.0, 1e-5, 7.73, 1.0, 1.0,
        ...             "poisson", sampling_rate=0.0625, nominal_batch=64,
        ...             local_steps=16, max_participations=20)
        >>> done = plan.composition(20)
        >>> done.noise_multiplier, done.sampling_rate, done.steps
        (1.0, 0.0625, 320)
        """
        return Composition(
            self.noise_multiplier,
            self.sampling_rate,
            participations * self.local_steps,
            "fixed" if self.sampling == "fixed" else "poisson",
        )

    @property
    def is_dp_sgd(self) -> bool:
        """Whether the client clips and noises by itself, step by step."""
        return self.unit != "client"

    @property
    def is_secret(self) -> bool:
        """Whether the guarantee rests on nobody's knowing the cohorts."""
        return self.unit == "client" and self.sampling != "rotation"

    @property
    def hash(self) -> str:
        """sha256 of the plan as canonical JSON, without `planned_epsilon`.

        That one follows from the others, and its last bits differ between machines
        whose FFTs do; everything else is equal wherever the configuration is.
        """
        content = dataclasses.asdict(self)
        del content["planned_epsilon"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(config: RunConfig) -> Plan | None:
    """Returns the plan of a run; None if it claims no privacy.

    **Guarantees**: depends on public constants alone (the nominal number of examples or
    persons, the nominal batch, rounds, cohort, target), never on data.
    ``planned_epsilon`` is the accountant's upper bound for a client that takes part in
    every round that the public rotation of :func:`rotation_cap` gives it, or in which
    it could have been drawn, and is at most the target.

    Raises:
        ConfigError: if no noise reaches the target in the rounds asked (says how many
            rounds fit), or a value would make the epsilon wrong.
    """
    if config.privacy.unit == "none":
        return None
    shape = (
        _client_level(config) if config.privacy.unit == "client" else _dp_sgd(config)
    )
    plan = Plan(
        unit=config.privacy.unit,
        relation="",
        target_epsilon=config.privacy.target_epsilon,
        target_delta=config.privacy.target_delta,
        planned_epsilon=math.inf,
        noise_multiplier=1.0,
        clipping_norm=config.privacy.clipping_norm,
        **shape,
    )
    noise_multiplier = _noise_multiplier(config, plan)
    plan = dataclasses.replace(plan, noise_multiplier=noise_multiplier)
    done = plan.composition(plan.max_participations)
    planned = epsilon([done], plan.target_delta)
    budget = config.privacy.budget_epsilon
    if budget is not None and budget < planned:
        raise ConfigError(
            f"[privacy] budget_epsilon: expected at least the plan's {planned:.4f} "
            f"({plan.unit}, {done.relation}), got {budget:g}: every client would "
            "refuse; lower target_epsilon."
        )
    return dataclasses.replace(
        plan,
        relation=done.relation,
        planned_epsilon=planned,
        count_noise=_count_noise(config, noise_multiplier),
    )


def _dp_sgd(config: RunConfig) -> dict[str, Any]:
    """Returns how a client samples its examples or persons."""
    nominal_batch = config.training.batch_size
    sampling_rate = nominal_batch / config.nominal_units
    if not 0 < sampling_rate <= 1:
        raise ConfigError(
            f"[training] batch_size: expected 1 to {config.nominal_units}, the nominal "
            f"number of units, got {nominal_batch}: the sampling rate is their ratio "
            "and a probability."
        )
    by_person = config.privacy.unit == "person"
    return {
        "sampling": "poisson",
        "sampling_rate": sampling_rate,
        "nominal_batch": nominal_batch,
        "local_steps": nominal_steps(config.training, config.nominal_units),
        "max_participations": _cap(config),
        "max_examples": config.privacy.max_examples_per_person if by_person else None,
    }


def _client_level(config: RunConfig) -> dict[str, Any]:
    """Returns how the server samples clients, and which noise it correlates."""
    size, num_clients = config.cohort.size, config.partition.num_clients
    sampling, rounds = config.cohort.sampling, config.run.rounds
    is_rotation = sampling == "rotation"
    bands = None
    if config.privacy.mechanism == "banded":
        # Two seats of one client are num_clients apart in the walk of `rotation_cap`.
        bands = best_bands(rounds, min(rounds, num_clients // size))
    return {
        "sampling": sampling,
        "sampling_rate": 1.0 if is_rotation else size / num_clients,
        "nominal_batch": size,
        "local_steps": 1,
        "max_participations": _cap(config) if is_rotation else rounds,
        "mechanism": config.privacy.mechanism,
        "bands": bands,
    }


def _count_noise(config: RunConfig, noise_multiplier: float) -> float | None:
    """Returns the noise on the count of an adaptive norm, checked to be enough."""
    adaptive = config.privacy.adaptive_clipping
    if adaptive is None:
        return None
    # A twentieth of the cohort, as in the paper; a small one would leave no noise.
    count_noise = adaptive.count_noise or max(config.cohort.size / 20, noise_multiplier)
    try:
        split_noise(noise_multiplier, count_noise)
    except ValueError as error:
        raise ConfigError(
            f"[privacy.adaptive_clipping] count_noise: {_lower(str(error))}"
        ) from None
    return count_noise


def _cap(config: RunConfig) -> int:
    return rotation_cap(
        config.run.rounds, config.cohort.size, config.partition.num_clients
    )


def nominal_steps(training: TrainingSection, nominal_units: int) -> int:
    """Returns the local steps a round: `local_epochs` over the nominal units.

    At least one; the nearest whole number otherwise, a half to the even one.

    >>> from fedpeft.sections import TrainingSection
    >>> nominal_steps(TrainingSection(learning_rate=0.1, batch_size=32), 512)
    16
    """
    epoch = nominal_units / training.batch_size
    return max(1, round(training.local_epochs * epoch))


def rotation_cap(rounds: int, cohort_size: int, num_clients: int) -> int:
    """Returns how often the public rotation takes one client, at most.

    Round r, from 1, takes the clients ``((r - 1) * cohort_size + j) mod num_clients``
    for j from 0 to ``cohort_size - 1``: all rounds together walk around the circle of
    clients without a gap, so no client is met more often than the walk's length over
    the circle's, rounded up.

    >>> rotation_cap(rounds=20, cohort_size=6, num_clients=20)
    6
    """
    return -(-rounds * cohort_size // num_clients)


def _noise_multiplier(config: RunConfig, plan: Plan) -> float:
    """Returns the noise multiplier of the plan, or says in rounds why there is none."""
    done = plan.composition(plan.max_participations)
    try:
        return calibrate(
            done.sampling_rate,
            done.steps,
            target_epsilon=plan.target_epsilon,
            target_delta=plan.target_delta,
            sampling=done.sampling,
        )
    except TargetOutOfReach as error:
        fit = error.max_steps // plan.local_steps
        raise _too_many_rounds(config, plan, fit) from None
    except ValueError as error:
        raise ConfigError(
            f"[privacy]: {error} Take fewer [run] rounds or [training] local_epochs."
        ) from None


def _too_many_rounds(config: RunConfig, plan: Plan, participations: int) -> ConfigError:
    """Says how many rounds fit into so many participations of one client."""
    rounds = participations
    if not plan.is_secret:
        rounds = participations * config.partition.num_clients // config.cohort.size
    advice = (
        f"set [run] rounds = {rounds}, raise the target"
        if rounds
        else "raise the target, take smaller batches"
    )
    return ConfigError(
        f"[privacy] target_epsilon: expected a target that some noise multiplier up to "
        f"{MAX_NOISE_MULTIPLIER:g} reaches in {config.run.rounds} rounds, got "
        f"{config.privacy.target_epsilon:g} at delta {config.privacy.target_delta:g} "
        f"({plan.unit}, {plan.composition().relation}): "
        f"{rounds} rounds fit; {advice} or take fewer [training] local_epochs."
    )


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
