"""May a client take part in one more round? Its ledger and its plan decide."""

import math
from collections.abc import Sequence

from fedpeft.errors import PrivacyBudgetExceeded
from fedpeft.privacy.accountant import Composition
from fedpeft.privacy.filter import admits
from fedpeft.privacy.ledger import SEEDED, Entry
from fedpeft.privacy.plan import Plan

ENROLMENT = 0
"""The number of the round in which a client joins a run with secret cohorts."""


def price(plan: Plan, entries: Sequence[Entry], run: str) -> Composition:
    """Returns what a client's next answer in a run releases.

    Where cohorts are secret every round speaks of every client, drawn or not: the
    chance of not being drawn is what amplifies, and it is used up either way. So all
    clients are charged the whole run before its first round (:data:`ENROLMENT`), and
    their answers cost nothing more.
    """
    if not plan.is_secret:
        return plan.composition()
    return plan.composition(
        0 if _is_enrolled(entries, run) else plan.max_participations
    )


def authorise(
    plan: Plan,
    entries: Sequence[Entry],
    run: str,
    server_round: int,
    *,
    is_seeded: bool,
    budget_epsilon: float | None,
) -> None:
    """Checks that plan and ledger allow one more answer.

    Args:
        plan: of the run.
        entries: everything that the data source ever released.
        run: which run asks.
        server_round: which round.
        is_seeded: whether the noise will be removable.
        budget_epsilon: over all runs; None allows the plan's target.

    Raises:
        PrivacyBudgetExceeded: if they do not; says why.
    """
    _same_kind(plan, entries)
    if any(e.run == run and e.plan_hash != plan.hash for e in entries):
        raise PrivacyBudgetExceeded(
            "The ledger holds answers to this run under another plan: start a new run."
        )
    if plan.is_secret and server_round != ENROLMENT and not _is_enrolled(entries, run):
        raise PrivacyBudgetExceeded(
            "The plan draws cohorts in secret and charges every client before the "
            "first round; this one was not asked to join: start a new run."
        )
    if any(entry.mechanism == SEEDED for entry in entries) and not is_seeded:
        raise PrivacyBudgetExceeded(
            "The ledger holds releases with seeded noise, which whoever knows the seed "
            "can remove: nothing can be promised for these data any more."
        )
    rounds = [e.round for e in entries if e.run == run and e.round != ENROLMENT]
    if len(rounds) >= plan.max_participations:
        raise PrivacyBudgetExceeded(
            f"The plan allows {plan.max_participations} rounds a client, and this one "
            "has had them."
        )
    apart = min((abs(server_round - other) for other in rounds), default=math.inf)
    if plan.bands is not None and apart < plan.bands:
        raise PrivacyBudgetExceeded(
            f"The plan's noise needs {plan.bands} rounds from one answer of a client "
            f"to the next, got {apart}."
        )
    budget = budget_epsilon or plan.target_epsilon
    history = [entry.composition for entry in entries]
    release = price(plan, entries, run)
    if not admits(history, release, budget_epsilon=budget, delta=plan.target_delta):
        raise PrivacyBudgetExceeded(
            f"One more round would exceed the budget of epsilon {budget:g} "
            f"({plan.unit}, {plan.relation}) at delta {plan.target_delta:g}: it counts "
            f"{len(entries)} releases already, over all runs."
        )


def _is_enrolled(entries: Sequence[Entry], run: str) -> bool:
    return any(entry.run == run and entry.round == ENROLMENT for entry in entries)


def _same_kind(plan: Plan, entries: Sequence[Entry]) -> None:
    """Refuses what can only be stated beside the plan's epsilon, never added to it."""
    for entry in entries:
        mine, theirs = (plan.unit, plan.relation), (entry.unit, entry.relation)
        if entry.unit != "none" and mine != theirs:
            raise PrivacyBudgetExceeded(
                f"The ledger holds releases of unit {entry.unit!r}, {entry.relation}; "
                f"the plan's are of unit {plan.unit!r}, {plan.relation}. Epsilons of "
                "different units or relations are never added."
            )
