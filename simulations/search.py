"""Searches for the method, rank and placement that suit a scenario."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, PrivacyBudgetExceeded
from fedpeft.privacy import Plan
from fedpeft.search import (
    Candidate,
    Trial,
    front,
    halving,
    read_candidates,
    rungs,
    shipped_candidates,
)
from simulations.comparison import Comparison, open_comparison
from simulations.trials import check_budget, refusal, spent, train, trial_plan


@dataclass
class Search:
    """A search as it goes on.

    Attributes:
        comparison: on which data.
        plan: of the first rung's trials; None without privacy.
        skipped: ``[peft]`` tables that cannot be trained here, and why.
        spent_before: epsilon of the client's ledger at the start; None on public data.
        trials: all that are done, in order.
        stopped: why it ended before its time; empty if it did not.
    """

    comparison: Comparison
    plan: Plan | None
    skipped: dict[str, str]
    spent_before: float | None
    trials: list[Trial] = field(default_factory=list)
    stopped: str = ""

    @property
    def front(self) -> list[Trial]:
        """What no other choice beats in metric, bytes and epsilon."""
        return front(self.trials, is_loss=self.comparison.is_loss)

    @property
    def spent(self) -> float | None:
        """Epsilon of the client's ledger now; None on public data."""
        return None if self.spent_before is None else spent(self.comparison)

    def to_json(self) -> dict[str, Any]:
        """Returns everything that may be published: no number of private examples."""
        found, plan = self.comparison, self.plan
        is_public = found.state is None
        return {
            "schema_version": 1,
            "config_hash": found.config.hash,
            "task": found.config.model.task,
            "backbone": found.config.model.backbone,
            "metric": found.metric,
            "is_loss": found.is_loss,
            "data": "public" if is_public else "charged",
            "trained_on": len(found.examples) if is_public else None,
            "judged_on": len(found.judged),
            "privacy": plan
            and {
                "unit": plan.unit,
                "relation": plan.relation,
                "target_epsilon": plan.target_epsilon,
                "target_delta": plan.target_delta,
                "noise": found.config.privacy.noise,
                "data_source": None if is_public else found.source,
                "spent_epsilon_before": self.spent_before,
                "spent_epsilon": self.spent,
            },
            "skipped": self.skipped,
            "stopped": self.stopped,
            "trials": [trial.to_json() for trial in self.trials],
            "front": [trial.to_json() for trial in self.front],
        }


def search(
    config: RunConfig,
    *,
    candidates: Path | None = None,
    client: int = 0,
    state: Path | None = None,
    steps: int = 4,
    epsilons: Sequence[float] = (),
    show: Callable[[Trial], None] = lambda trial: None,
) -> Search:
    """Trains the candidates by successive halving, and the last ones at each epsilon.

    Args:
        config: the scenario; what is not in ``[peft]`` holds for all candidates.
        candidates: a file of them; None for the shipped ones.
        client: its index.
        state: of the client's ledger, to train on its records; None for public data.
        steps: of a candidate in the first rung.
        epsilons: targets at which the last rung's candidates are trained once more.
        show: is told of each trial as it is done.

    Raises:
        ConfigError: for a file or a scenario that cannot be searched; nothing was
            trained then.
        PrivacyBudgetExceeded: if the client's budget does not cover the first rung;
            nothing was spent then. Later it ends the search with what there is.
    """
    if epsilons and not config.is_private:
        raise ConfigError("--epsilons: expected a scenario with privacy, got none.")
    given = candidates and read_candidates(candidates, config.training.learning_rate)
    comparison = open_comparison(config, client=client, state=state)
    chosen, skipped = _trainable(
        comparison,
        given
        or shipped_candidates(comparison.num_layers, config.training.learning_rate),
    )
    plan = _first_plan(comparison, chosen, steps, epsilons)
    if plan is not None and state is not None:
        check_budget(comparison, plan, len(chosen))
    found = Search(comparison, plan, skipped, spent(comparison) if state else None)

    def note(trial: Trial) -> None:
        found.trials.append(trial)
        show(trial)

    try:
        for trial in halving(
            chosen,
            steps,
            lambda *arguments: train(comparison, *arguments),
            is_loss=comparison.is_loss,
        ):
            note(trial)
        for trial in _last(found.trials):
            for target in epsilons:
                if target != trial.epsilon:
                    note(
                        train(
                            comparison,
                            trial.candidate,
                            trial.rung,
                            trial.steps,
                            target,
                        )
                    )
    except PrivacyBudgetExceeded as error:
        found.stopped = str(error)
    return found


def _trainable(
    comparison: Comparison, candidates: Sequence[Candidate]
) -> tuple[list[Candidate], dict[str, str]]:
    """Returns the candidates that fit the backbone, and why the others do not."""
    reasons: dict[str, str] = {}
    for candidate in candidates:
        if candidate.label not in reasons:
            reasons[candidate.label] = refusal(comparison, candidate)
    skipped = {label: reason for label, reason in reasons.items() if reason}
    chosen = [c for c in candidates if c.label not in skipped]
    if not chosen:
        label, reason = next(iter(skipped.items()))
        raise ConfigError(
            f"Expected a candidate that can be trained here, got none of {len(skipped)}"
            f"; {label}: {reason}"
        )
    return chosen, skipped


def _first_plan(
    comparison: Comparison,
    candidates: Sequence[Candidate],
    steps: int,
    epsilons: Sequence[float],
) -> Plan | None:
    """Works out every plan of the search, so that none fails halfway."""
    lengths = [length for _, length in rungs(len(candidates), steps)]
    plans = [trial_plan(comparison, candidates[0], length) for length in lengths]
    for target in epsilons:
        trial_plan(comparison, candidates[0], lengths[-1], target)
    return plans[0]


def _last(trials: Sequence[Trial]) -> list[Trial]:
    """Returns the last rung's trials that have a value."""
    last = max(trial.rung for trial in trials)
    return [t for t in trials if t.rung == last and t.value is not None]
