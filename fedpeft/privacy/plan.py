"""The plan: what a run will release, fixed before its first round.

A plan is a pure function of public constants, so that a client works it out for itself
and believes no server. Parameters that never change are what makes plain composition
valid against a server that adapts: whatever it sees, it cannot choose them.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.privacy.accountant import Composition, epsilon
from fedpeft.privacy.calibration import (
    MAX_NOISE_MULTIPLIER,
    TargetOutOfReach,
    calibrate,
)
from fedpeft.sections import TrainingSection

RELATION = "add-or-remove-one"


@dataclass(frozen=True)
class Plan:
    """What one client releases, at most, in a whole run.

    Attributes:
        unit: what one epsilon protects: one ``example``.
        relation: the neighbouring relation of the epsilon.
        target_epsilon: what was asked, at `target_delta`.
        target_delta: in (0, 1).
        planned_epsilon: what `max_participations` cost; at most the target.
        noise_multiplier: unitless; the noise on a step's sum has standard deviation
            ``noise_multiplier * clipping_norm``.
        clipping_norm: L2 bound of one unit's contribution to a step's sum.
        sampling_rate: Poisson probability that an example is in a step's batch.
        nominal_batch: the divisor of a step's sum, whatever the batch's real size.
        local_steps: noised steps a round.
        max_participations: rounds in which one client takes part, at most.
    """

    unit: str
    relation: str
    target_epsilon: float
    target_delta: float
    planned_epsilon: float
    noise_multiplier: float
    clipping_norm: float
    sampling_rate: float
    nominal_batch: int
    local_steps: int
    max_participations: int

    def composition(self, participations: int = 1) -> Composition:
        """Returns what a client has released after so many rounds.

        >>> plan = Plan("example", "add-or-remove-one", 8.0, 1e-5, 7.73, 1.0, 1.0,
        ...             sampling_rate=0.0625, nominal_batch=64, local_steps=16,
        ...             max_participations=20)
        >>> plan.composition(20)
        Composition(noise_multiplier=1.0, sampling_rate=0.0625, steps=320)
        """
        return Composition(
            self.noise_multiplier, self.sampling_rate, participations * self.local_steps
        )

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

    **Guarantees**: depends on public constants alone (the nominal number of examples,
    the nominal batch, rounds, cohort, target), never on data. ``planned_epsilon`` is
    the accountant's upper bound for a client that takes part in every round that the
    public rotation of :func:`rotation_cap` gives it, and is at most the target.

    Raises:
        ConfigError: if no noise reaches the target in the rounds asked (says how many
            rounds fit), or a value would make the epsilon wrong.
    """
    if config.privacy.unit == "none":
        return None
    nominal_batch = config.training.batch_size
    sampling_rate = nominal_batch / config.data.nominal_examples
    if not 0 < sampling_rate <= 1:
        raise ConfigError(
            "[training] batch_size: expected 1 to [data] nominal_examples = "
            f"{config.data.nominal_examples}, got {nominal_batch}: the sampling rate "
            "is their ratio and a probability."
        )
    local_steps = nominal_steps(config.training, config.data.nominal_examples)
    max_participations = rotation_cap(
        config.run.rounds, config.cohort.size, config.partition.num_clients
    )
    noise_multiplier = _noise_multiplier(
        config, sampling_rate, local_steps, max_participations
    )
    done = Composition(
        noise_multiplier, sampling_rate, max_participations * local_steps
    )
    return Plan(
        unit=config.privacy.unit,
        relation=RELATION,
        target_epsilon=config.privacy.target_epsilon,
        target_delta=config.privacy.target_delta,
        planned_epsilon=epsilon([done], config.privacy.target_delta),
        noise_multiplier=noise_multiplier,
        clipping_norm=config.privacy.clipping_norm,
        sampling_rate=sampling_rate,
        nominal_batch=nominal_batch,
        local_steps=local_steps,
        max_participations=max_participations,
    )


def nominal_steps(training: TrainingSection, nominal_examples: int) -> int:
    """Returns the local steps a round: `local_epochs` over the nominal examples.

    At least one; the nearest whole number otherwise, a half to the even one.

    >>> from fedpeft.sections import TrainingSection
    >>> nominal_steps(TrainingSection(learning_rate=0.1, batch_size=32), 512)
    16
    """
    epoch = nominal_examples / training.batch_size
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


def _noise_multiplier(
    config: RunConfig, sampling_rate: float, local_steps: int, max_participations: int
) -> float:
    """Returns the noise multiplier of the plan, or says in rounds why there is none."""
    try:
        return calibrate(
            sampling_rate,
            max_participations * local_steps,
            target_epsilon=config.privacy.target_epsilon,
            target_delta=config.privacy.target_delta,
        )
    except TargetOutOfReach as error:
        raise _too_many_rounds(config, error.max_steps // local_steps) from None
    except ValueError as error:
        raise ConfigError(f"[privacy]: {error}") from None


def _too_many_rounds(config: RunConfig, participations: int) -> ConfigError:
    """Says how many rounds fit into so many participations of one client."""
    rounds = participations * config.partition.num_clients // config.cohort.size
    advice = (
        f"set [run] rounds = {rounds}, raise the target"
        if rounds
        else "raise the target, take smaller batches"
    )
    return ConfigError(
        f"[privacy] target_epsilon: expected a target that some noise multiplier up to "
        f"{MAX_NOISE_MULTIPLIER:g} reaches in {config.run.rounds} rounds, got "
        f"{config.privacy.target_epsilon:g} at delta {config.privacy.target_delta:g}: "
        f"{rounds} rounds fit; {advice} or take fewer [training] local_epochs."
    )
