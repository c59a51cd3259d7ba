"""The planner: what epsilon would be at other choices, before anything runs.

Each :class:`Curve` changes one number of the scenario and keeps all others, the noise
of the plan among them. :func:`allowances` is the inverse: how many rounds a target
allows. All of it follows from public constants, as the plan does.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fedpeft.config import RunConfig
from fedpeft.privacy.accountant import Composition, epsilon, most_steps
from fedpeft.privacy.calibration import max_steps
from fedpeft.privacy.plan import Plan, nominal_steps, rotation_cap

Quantity = Literal["rounds", "noise multiplier", "batch size", "cohort size"]

_ROUNDS = [*(eighths / 8 for eighths in range(1, 9)), 2.0, 4.0]
_NOISES = [0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0]
_SIZES = [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0, 3 / 2, 2.0, 4.0]


@dataclass(frozen=True)
class Row:
    """One choice and what it costs.

    Attributes:
        value: of the quantity: a count, or a unitless noise multiplier.
        steps: noised releases that a client is charged for, at most.
        epsilon: of all of them together, at the plan's delta.
        is_plan: whether this is what the scenario says.
    """

    value: float
    steps: int
    epsilon: float
    is_plan: bool


@dataclass(frozen=True)
class Curve:
    """Epsilon against one quantity, rows in its order."""

    quantity: Quantity
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Allowance:
    """What the target allows at a noise multiplier.

    Attributes:
        noise_multiplier: unitless.
        rounds: of a run, at most; 0 if not even one fits.
        participations: of one client in them, at most.
        epsilon: after these; at most the target.
        is_plan: whether it is the plan's noise multiplier.
    """

    noise_multiplier: float
    rounds: int
    participations: int
    epsilon: float
    is_plan: bool


@dataclass(frozen=True)
class Forecast:
    """A plan and what stands around it.

    Attributes:
        plan: of the scenario.
        rounds: of its run.
        epsilon_by_participations: of one client, at the plan's delta; 40 of them or
            fewer.
        curves: see :func:`curves`.
        allowances: see :func:`allowances`; empty if nobody asked.
    """

    plan: Plan
    rounds: int
    epsilon_by_participations: dict[int, float]
    curves: tuple[Curve, ...]
    allowances: tuple[Allowance, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the plan's fields, and the forecast beside them."""
        content = dataclasses.asdict(self)
        plan = content.pop("plan")
        content["curves"] = {
            curve["quantity"].replace(" ", "_"): curve["rows"]
            for curve in content["curves"]
        }
        return {**plan, **content}


def forecast(config: RunConfig, plan: Plan, *, inverse: bool = False) -> Forecast:
    """Returns everything that can be said of a scenario before it runs.

    Args:
        config: the scenario.
        plan: what ``make_plan`` makes of it.
        inverse: whether to work out the allowances too.
    """
    taken = _thinned(plan.max_participations)
    spent = {n: epsilon([plan.composition(n)], plan.target_delta) for n in taken}
    return Forecast(
        plan=plan,
        rounds=config.run.rounds,
        epsilon_by_participations=spent,
        curves=curves(config, plan),
        allowances=allowances(config, plan, noises(plan)) if inverse else (),
    )


def curves(config: RunConfig, plan: Plan) -> tuple[Curve, ...]:
    """Returns epsilon against rounds, noise multiplier, batch size and cohort size.

    **Guarantees**: every epsilon is the accountant's upper bound, of the plan's unit
    and relation, for the client that is charged most. The row of the plan has the
    plan's own epsilon. Choices beyond what the accountant resolves are left out, and so
    is the batch size for the unit ``client``, which does not depend on it.

    Args:
        config: the scenario.
        plan: what ``make_plan`` makes of it.
    """
    rounds, batch, cohort = (
        config.run.rounds,
        config.training.batch_size,
        config.cohort.size,
    )
    lengths = [math.ceil(rounds * share) for share in _ROUNDS]
    choices: list[tuple[Quantity, float, Iterable[float]]] = [
        ("rounds", rounds, lengths),
        ("noise multiplier", plan.noise_multiplier, noises(plan)),
    ]
    if plan.is_dp_sgd:
        choices.append(("batch size", batch, _sizes(batch, config.nominal_units)))
    clients = config.partition.num_clients
    choices.append(("cohort size", cohort, _sizes(cohort, clients)))
    return tuple(
        Curve(quantity, tuple(_rows(config, plan, quantity, planned, values)))
        for quantity, planned, values in choices
    )


def noises(plan: Plan) -> Iterator[float]:
    """Yields noise multipliers around the plan's, rising, from half to twice.

    Three digits, but for the plan's own.
    """
    for factor in _NOISES:
        noise = factor * plan.noise_multiplier
        yield noise if factor == 1 else float(f"{noise:.3g}")


def allowances(
    config: RunConfig, plan: Plan, noise_multipliers: Iterable[float]
) -> tuple[Allowance, ...]:
    """Returns how many rounds the plan's target allows at each noise multiplier.

    Never more than the accountant resolves.

    Args:
        config: the scenario; its cohort size turns a client's participations into
            rounds.
        plan: the constants that stay.
        noise_multipliers: unitless.
    """
    return tuple(_allowance(config, plan, noise) for noise in noise_multipliers)


def _thinned(participations: int, most: int = 40) -> list[int]:
    """Returns the counts from 1 to `participations`, or `most` of them, evenly.

    >>> _thinned(4), _thinned(10, most=5)
    ([1, 2, 3, 4], [2, 4, 6, 8, 10])
    """
    step = math.ceil(participations / most)
    return list(range(participations, 0, -step))[::-1]


def _rows(
    config: RunConfig,
    plan: Plan,
    quantity: Quantity,
    planned: float,
    values: Iterable[float],
) -> Iterator[Row]:
    """Yields what each value costs, if that can be accounted."""
    for value in sorted(set(values)):
        done = _composition(config, plan, quantity, value)
        if done.steps <= most_steps(plan.target_delta):
            cost = epsilon([done], plan.target_delta)
            yield Row(value, done.steps, cost, is_plan=value == planned)


def _composition(
    config: RunConfig, plan: Plan, quantity: Quantity, value: float
) -> Composition:
    """Returns all that a client is charged for, with one value changed."""
    rounds, cohort = config.run.rounds, config.cohort.size
    if quantity == "rounds":
        rounds = int(value)
    elif quantity == "noise multiplier":
        plan = dataclasses.replace(plan, noise_multiplier=value)
    elif quantity == "batch size":
        plan = _with_batch(config, plan, int(value))
    else:
        cohort = int(value)
        plan = _with_cohort(config, plan, cohort)
    if plan.is_secret:  # each round speaks of every client, in it or not
        return plan.composition(rounds)
    clients = config.partition.num_clients
    return plan.composition(rotation_cap(rounds, cohort, clients))


def _with_batch(config: RunConfig, plan: Plan, size: int) -> Plan:
    """Larger batches are fewer: the passes over the data stay."""
    training = config.training.model_copy(update={"batch_size": size})
    return dataclasses.replace(
        plan,
        sampling_rate=size / config.nominal_units,
        local_steps=nominal_steps(training, config.nominal_units),
    )


def _with_cohort(config: RunConfig, plan: Plan, size: int) -> Plan:
    """A larger cohort is met more often, or it is hidden less."""
    if not plan.is_secret:
        return plan
    rate = size / config.partition.num_clients
    return dataclasses.replace(plan, sampling_rate=rate)


def _allowance(config: RunConfig, plan: Plan, noise_multiplier: float) -> Allowance:
    changed = dataclasses.replace(plan, noise_multiplier=noise_multiplier)
    one = changed.composition()
    steps = max_steps(
        one.noise_multiplier,
        one.sampling_rate,
        target_epsilon=plan.target_epsilon,
        target_delta=plan.target_delta,
        sampling=one.sampling,
    )
    participations = steps // one.steps
    rounds = participations
    if not plan.is_secret:
        # The most rounds of which a rotation gives nobody more.
        rounds = participations * config.partition.num_clients // config.cohort.size
    return Allowance(
        noise_multiplier=noise_multiplier,
        rounds=rounds,
        participations=participations,
        epsilon=epsilon([changed.composition(participations)], plan.target_delta),
        is_plan=noise_multiplier == plan.noise_multiplier,
    )


def _sizes(planned: int, most: int) -> Iterator[float]:
    """Yields sizes around the planned one, from 1 to the most there can be."""
    for factor in _SIZES:
        size = math.ceil(planned * factor)
        if 1 <= size <= most:
            yield size
