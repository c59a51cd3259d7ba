"""All that is random in an answer, drawn as the plan says and counted."""

from collections.abc import Iterator, Sequence

import torch

from fedpeft.privacy.plan import Plan
from fedpeft.privacy.randomness import (
    Randomness,
    SeededRandomness,
    noised,
    poisson_batch,
    sample,
)


class Draws:
    """The batches, the noise and the dropout masks of one answer.

    **Guarantees**: batches are Poisson at the plan's rate; noise has the plan's
    standard deviation; :meth:`check` holds only if each step had one of both.

    Args:
        plan: None for a run without privacy, which draws nothing here.
        randomness: where everything comes from.
    """

    def __init__(self, plan: Plan | None, randomness: Randomness) -> None:
        self._plan = plan
        self._randomness = randomness
        self._batches = 0
        self._noises = 0

    @property
    def has_begun(self) -> bool:
        """Whether a batch was drawn: from here on all depends on data."""
        return self._batches > 0

    @property
    def is_seeded(self) -> bool:
        """Whether whoever knows a seed can remove the noise."""
        return isinstance(self._randomness, SeededRandomness)

    def mask_seed(self) -> int:
        """Returns a seed for dropout masks that depends on nothing an adversary knows.

        One more example shifts every other's mask. That costs no privacy only if masks
        are random and independent of the batch; under a public seed they are not.
        """
        return int(self._randomness.uniform(1).item() * 2**53)

    def batches(self, units: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
        """Yields one Poisson batch for each local step of the plan.

        Args:
            units: of privacy, each a list of indices of examples: one, or a person's.

        Yields:
            The units drawn, each with at most the plan's `max_examples`, themselves
            drawn anew in every step.
        """
        plan = self._plan
        if plan is None or not plan.is_dp_sgd:
            raise ValueError(
                "Expected a plan with batches: only DP-SGD at the client draws them."
            )
        for _ in range(plan.local_steps):
            self._batches += 1
            chosen = poisson_batch(len(units), plan.sampling_rate, self._randomness)
            most = plan.max_examples
            yield [sample(units[unit], most, self._randomness) for unit in chosen]

    def noise(self, total: torch.Tensor, standard_deviation: float) -> torch.Tensor:
        """Returns `total` with Gaussian noise; a :data:`~fedpeft.interfaces.NoiseFn`.

        Raises:
            ValueError: if the standard deviation is not the plan's.
        """
        plan = self._plan
        planned = plan.noise_multiplier * plan.clipping_norm if plan else 0.0
        if standard_deviation != planned:
            raise ValueError(f"Expected noise of {planned}, got {standard_deviation}.")
        self._noises += 1
        return noised(total, standard_deviation, self._randomness)

    def check(self) -> None:
        """Raises ValueError unless each planned step had its batch and its noise."""
        plan = self._plan
        planned = plan.local_steps if plan and plan.is_dp_sgd else 0
        if (self._batches, self._noises) != (planned, planned):
            raise ValueError(
                f"Expected {planned} batches and {planned} noises as planned, got "
                f"{self._batches} and {self._noises}: nothing is released."
            )
