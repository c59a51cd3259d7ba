"""What makes the releases of a trial: a client's real steps, or the server's rounds.

The optimiser is plain SGD at rate 1 and nothing is compressed: both come after the
noise, so that another choice can hide a mistake but never make one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fedpeft.audit.canaries import as_examples, canary_model
from fedpeft.config import RunConfig
from fedpeft.interfaces import PrivacyEngine, Update
from fedpeft.model import TaskModel, trainable_state
from fedpeft.privacy import (
    SLACK,
    DpSgd,
    GradientSource,
    Plan,
    PrivateMean,
    Randomness,
    SecureRandomness,
    SeededRandomness,
)
from fedpeft.privacy.draws import Draws
from fedpeft.sections import TrainingSection
from fedpeft.seeds import derive_seed
from fedpeft.tensors import flatten, unflatten, zeros_like
from fedpeft.training import train_locally


class Mechanism(Protocol):
    """Turns a data set into releases."""

    def sums(
        self, rows: torch.Tensor, persons: list[int], source: Randomness
    ) -> torch.Tensor:
        """Returns independent noised sums, shape ``(releases, total)``.

        Args:
            rows: what the units contribute before it is clipped, ``(rows, total)``.
            persons: whose each row is.
            source: of batches and noise.
        """


@dataclass(frozen=True, eq=False)
class LocalSteps:
    """A client's local training, seen step by step, as the accountant assumes.

    Attributes:
        config: of the run.
        plan: of the trial; each of its local steps is one release.
        model: of canaries.
        engine: bound to it.
        section: how the canaries are trained on.
    """

    config: RunConfig
    plan: Plan
    model: TaskModel
    engine: PrivacyEngine
    section: TrainingSection

    @classmethod
    def of(
        cls, config: RunConfig, plan: Plan, sizes: dict[str, int], physical_batch: int
    ) -> "LocalSteps":
        """Builds a canary model and binds the engine of the run's clients to it."""
        model = canary_model(sizes)
        engine = engine_of(config, plan, model)
        section = TrainingSection(
            optimizer="sgd",
            learning_rate=1.0,
            batch_size=plan.nominal_batch,
            max_physical_batch=physical_batch,
            precision=config.training.precision,
        )
        return cls(config, plan, model, engine, section)

    def sums(
        self, rows: torch.Tensor, persons: list[int], source: Randomness
    ) -> torch.Tensor:
        """Trains once and returns every step's noised sum."""
        return self.steps(rows, persons, Draws(self.plan, source))

    def steps(
        self, rows: torch.Tensor, persons: list[int], draws: Draws
    ) -> torch.Tensor:
        """Trains with the draws of a release; returns every step's noised sum."""
        examples = as_examples(rows * self.plan.clipping_norm, persons)
        units = examples.units(self.plan.unit == "person")
        trainable = list(self.model.module.parameters())
        states: list[torch.Tensor] = []

        def watched(batches: Iterable[list[list[int]]]) -> Iterator[list[list[int]]]:
            for batch in batches:
                states.append(nn.utils.parameters_to_vector(trainable).detach())
                yield batch

        update = train_locally(
            self.model,
            zeros_like(trainable_state(self.model)),
            examples,
            watched(draws.batches(units)),
            engine=self.engine,
            noise=draws.noise,
            section=self.section,
            rate_factor=1.0,
            mask_seed=draws.mask_seed(),
        )
        states.append(flatten(update))
        return -torch.stack(states).diff(dim=0) * self.plan.nominal_batch


@dataclass(frozen=True, eq=False)
class ServerRounds:
    """The server's clipped and noised mean of updates, seen round by round.

    Attributes:
        plan: of the run, of unit ``client``.
        sizes: of the updates' tensors.
        rounds: releases of one call, each a first round.
    """

    plan: Plan
    sizes: dict[str, int]
    rounds: int

    def sums(
        self, rows: torch.Tensor, persons: list[int], source: Randomness
    ) -> torch.Tensor:
        """Aggregates the rows, each one client's update, once a release."""
        plan = self.plan
        like = {name: torch.zeros(size) for name, size in self.sizes.items()}
        rule = PrivateMean(
            plan.clipping_norm,
            plan.noise_multiplier,
            plan.nominal_batch,
            lambda _: source,
        )
        updates = [Update(unflatten(row * plan.clipping_norm, like)) for row in rows]
        start = rule.init(like)
        steps = (rule.aggregate(updates, start)[0] for _ in range(self.rounds))
        # The rule's own order is that of the names.
        return (
            torch.stack(
                [flatten({name: step[name] for name in like}) for step in steps]
            )
            * plan.nominal_batch
        )


def engine_of(config: RunConfig, plan: Plan, model: TaskModel) -> DpSgd:
    """Returns the engine of the run's clients, bound to a model."""
    engine = DpSgd(
        plan.clipping_norm,
        plan.noise_multiplier,
        plan.nominal_batch,
        slack=SLACK[config.training.precision],
        source=_opacus() if config.privacy.engine == "opacus" else None,
    )
    engine.bind(model.module, model.operations)
    return engine


def randomness(config: RunConfig, seed: int, *purpose: str | int) -> Randomness:
    """Returns a source of the kind that the run's answers use."""
    if config.privacy.noise == "seeded":
        return SeededRandomness(derive_seed(seed, *purpose))
    return SecureRandomness()


def _opacus() -> GradientSource:
    from fedpeft.privacy.opacus_hooks import OpacusHooks  # slow to import

    return OpacusHooks()
