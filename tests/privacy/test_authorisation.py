"""What a ledger and a plan allow, for the three units of privacy."""

import dataclasses

import pytest

from fedpeft.errors import PrivacyBudgetExceeded
from fedpeft.privacy import ENROLMENT, SEEDED, Composition, Plan, epsilon
from fedpeft.privacy.authorisation import authorise, price
from fedpeft.privacy.ledger import Entry

EXAMPLE = Plan(
    unit="example",
    relation="add-or-remove-one",
    target_epsilon=8.0,
    target_delta=1e-5,
    planned_epsilon=7.9,
    noise_multiplier=1.0,
    clipping_norm=1.0,
    sampling="poisson",
    sampling_rate=0.1,
    nominal_batch=8,
    local_steps=5,
    max_participations=4,
)
SECRET = dataclasses.replace(
    EXAMPLE, unit="client", local_steps=1, max_participations=40
)
BANDED = dataclasses.replace(
    SECRET,
    sampling="rotation",
    sampling_rate=1.0,
    noise_multiplier=4.0,
    max_participations=4,
    mechanism="banded",
    bands=5,
)


def _entry(plan: Plan, done: Composition, run: str, server_round: int) -> Entry:
    return Entry(
        run=run,
        round=server_round,
        data_source="client-000",
        unit=plan.unit,
        relation=plan.relation,
        mechanism="gaussian",
        noise_multiplier=done.noise_multiplier,
        sampling_rate=done.sampling_rate,
        steps=done.steps,
        clipping_norm=1.0,
        backbone="",
        plan_hash=plan.hash,
        request_hash="",
        payload_hash="",
    )


def _answered(plan: Plan, rounds: list[int], run: str = "run") -> list[Entry]:
    entries: list[Entry] = []
    for server_round in rounds:
        done = price(plan, entries, run)
        entries.append(_entry(plan, done, run, server_round))
    return entries


def _allow(plan: Plan, entries: list[Entry], server_round: int, run="run", **kwargs):
    asked = {"is_seeded": False, "budget_epsilon": None, **kwargs}
    authorise(plan, entries, run, server_round, **asked)


def test_twenty_rounds_are_one_composition() -> None:
    entries = _answered(EXAMPLE, [*range(20)])
    spent = epsilon([entry.composition for entry in entries], 1e-5)
    assert spent == epsilon([Composition(1.0, 0.1, 100)], 1e-5)
    assert spent > 2.9 * epsilon([Composition(1.0, 0.1, 5)], 1e-5)


def test_the_cap_holds_a_run_and_the_budget_all_runs() -> None:
    entries = _answered(EXAMPLE, [1, 2, 3, 4])
    with pytest.raises(PrivacyBudgetExceeded, match="4 rounds a client"):
        _allow(EXAMPLE, entries, 5)
    _allow(EXAMPLE, entries, 1, run="another")
    with pytest.raises(PrivacyBudgetExceeded, match="budget of epsilon 1 "):
        _allow(EXAMPLE, entries, 1, run="another", budget_epsilon=1.0)


def test_under_secret_cohorts_joining_is_charged_the_whole_run() -> None:
    entries = _answered(SECRET, [ENROLMENT, 3, 4])
    assert [entry.steps for entry in entries] == [40, 0, 0]
    spent = epsilon([entry.composition for entry in entries], 1e-5)
    assert spent == epsilon([SECRET.composition(40)], 1e-5)
    _allow(SECRET, entries, 10)


def test_who_was_not_asked_to_join_does_not_answer() -> None:
    with pytest.raises(PrivacyBudgetExceeded, match="not asked to join"):
        _allow(SECRET, [], 1)


def test_a_second_run_under_secret_cohorts_needs_a_budget_of_its_own() -> None:
    entries = _answered(SECRET, [ENROLMENT])  # and never drawn: it pays all the same
    spent = epsilon([SECRET.composition(40)], 1e-5)
    with pytest.raises(PrivacyBudgetExceeded, match="over all runs"):
        _allow(SECRET, entries, ENROLMENT, "another", budget_epsilon=1.01 * spent)
    _allow(SECRET, entries, ENROLMENT, "another", budget_epsilon=2 * spent)


def test_another_plan_under_the_same_run_is_refused() -> None:
    looser = dataclasses.replace(SECRET, noise_multiplier=0.5)
    with pytest.raises(PrivacyBudgetExceeded, match="another plan"):
        _allow(looser, _answered(SECRET, [ENROLMENT]), 1, budget_epsilon=1e3)


def test_banded_noise_keeps_its_distance_between_rounds() -> None:
    entries = _answered(BANDED, [2])
    with pytest.raises(PrivacyBudgetExceeded, match="needs 5 rounds from"):
        _allow(BANDED, entries, 6)
    _allow(BANDED, entries, 7)
    _allow(BANDED, entries, 1, run="another")


def test_units_and_relations_are_never_added() -> None:
    with pytest.raises(PrivacyBudgetExceeded, match="different units or relations"):
        _allow(EXAMPLE, _answered(SECRET, [1]), 1)
    fixed = dataclasses.replace(SECRET, sampling="fixed", relation="replace-one")
    with pytest.raises(PrivacyBudgetExceeded, match="replace-one"):
        _allow(SECRET, _answered(fixed, [ENROLMENT], run="earlier"), ENROLMENT)


def test_a_lost_entry_without_privacy_allows_nothing() -> None:
    lost = dataclasses.replace(EXAMPLE, unit="none", relation="none")
    with pytest.raises(PrivacyBudgetExceeded, match="budget"):
        _allow(EXAMPLE, [_entry(lost, Composition(0.0, 1.0, 1), "", 0)], 1)


def test_seeded_noise_taints_what_comes_after() -> None:
    entries = [
        dataclasses.replace(entry, mechanism=SEEDED)
        for entry in _answered(EXAMPLE, [1])
    ]
    _allow(EXAMPLE, entries, 2, is_seeded=True)
    with pytest.raises(PrivacyBudgetExceeded, match="seeded"):
        _allow(EXAMPLE, entries, 2)
