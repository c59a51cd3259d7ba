"""Update membership: members of a toy's batch are told from strangers."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from fedpeft.attacks._membership import MEMBERSHIP, coin_scores, membership_scores
from fedpeft.attacks.attack import (
    Case,
    Observation,
    Secret,
    Seen,
    with_updates_of,
)
from fedpeft.attacks.update_membership import UpdateMembership, _outside
from tests.attacks.federation import cases_of, small_model

MEASURES = ("projection", "cosine", "fedmia")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return cases_of(small_model("lora"), rounds=2, victims=4, strangers=12)


def _auc(case: Case, measure: str, other: Case | None = None) -> float:
    attack = UpdateMembership(measure)
    observation = case.observation
    if other is not None:
        observation = with_updates_of(observation, other.observation)
    guess = attack.run(observation, torch.Generator())
    return float(attack.score(guess, case.secret)["auc"].mean())


@pytest.mark.parametrize("measure", MEASURES)
def test_a_member_stands_out_and_the_control_does_not(
    cases: list[Case], measure: str
) -> None:
    own = [_auc(case, measure) for case in cases]
    control = [
        _auc(case, measure, other)
        for case, other in zip(cases, [*cases[1:], cases[0]], strict=True)
    ]
    assert min(own) > 0.9
    assert sum(control) / len(control) < 0.85


def test_the_smaller_space_is_projected_onto_the_larger() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    assert _outside(axes[:2], axes[:1]) == pytest.approx(0)
    assert _outside(axes[:1], axes[:2]) == pytest.approx(0)
    assert _outside(axes[:2], axes[3:]) == pytest.approx(1)
    assert _outside(axes[:1], axes[1:3]) == pytest.approx(1)


def test_a_round_in_which_nothing_moved_says_nothing(cases: list[Case]) -> None:
    seen = cases[0].observation.seen[0]
    still = {name: torch.zeros_like(t) for name, t in seen.update.items()}
    observation = _with_seen(cases[0], [Seen(1, seen.state, still)])
    guess = UpdateMembership().run(observation, torch.Generator())
    assert not guess.any()


def _with_seen(case: Case, seen: Sequence[Seen]) -> Observation:
    return dataclasses.replace(case.observation, seen=tuple(seen))


def test_rates_need_enough_strangers_to_be_resolved() -> None:
    is_member = torch.arange(101) < 1
    guess = torch.arange(101, 0, -1).double()
    scores = membership_scores(guess, Secret(None, is_member=is_member))
    assert scores["tpr_at_fpr_1e-2"].tolist() == [1.0]
    assert "tpr_at_fpr_1e-3" not in scores
    assert set(scores) < set(MEMBERSHIP)


def test_coins_are_at_chance(rng: torch.Generator) -> None:
    secret = Secret(None, is_member=torch.arange(4000) < 2000)
    assert float(coin_scores(secret, rng)["auc"].mean()) == pytest.approx(0.5, abs=0.03)


def test_without_candidates_or_others_there_is_one_clear_line(
    cases: list[Case],
) -> None:
    mine = cases[0].observation
    with pytest.raises(ValueError, match="Expected candidates"):
        UpdateMembership().run(
            dataclasses.replace(mine, candidates=None), torch.Generator()
        )
    with pytest.raises(ValueError, match="Expected a round with 2 updates of other"):
        UpdateMembership("fedmia").run(
            dataclasses.replace(mine, others=()), torch.Generator()
        )


@pytest.mark.parametrize(("others", "is_enough"), [(1, False), (2, False), (3, True)])
def test_one_more_stranger_is_wanted_than_is_compared_with(
    cases: list[Case], others: int, is_enough: bool
) -> None:
    mine = cases[0].observation
    few = dataclasses.replace(mine, others=mine.others[:others])
    assert (UpdateMembership("fedmia").unusable(few) is None) == is_enough
    assert UpdateMembership("cosine").unusable(few) is None


def test_rounds_with_too_few_strangers_are_passed_over(cases: list[Case]) -> None:
    mine = cases[0].observation
    first, *rest = mine.others
    lonely = dataclasses.replace(  # in the second round there is one other
        mine, others=(first, *(rounds[:1] for rounds in rest))
    )
    only = dataclasses.replace(mine, seen=mine.seen[:1])
    found, expected = (
        UpdateMembership("fedmia").run(observation, torch.Generator())
        for observation in (lonely, only)
    )
    assert torch.equal(found, expected)


def test_scores_that_are_no_numbers_are_refused() -> None:
    secret = Secret(None, is_member=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="Expected a finite score"):
        membership_scores(torch.tensor([torch.nan, 0.0]), secret)


def test_a_method_without_low_matrices_does_not_fit_a_projection() -> None:
    bias = small_model("bias", head=False)
    assert UpdateMembership().misfit(bias) is not None
    assert UpdateMembership("cosine").misfit(bias) is None
