"""Shadow models tell whom a released model was trained on, where it has memorised."""

import dataclasses

import pytest
import torch

from fedpeft.attacks._confidence import log_odds
from fedpeft.attacks.attack import Case, Knowledge, Observation, Secret
from fedpeft.attacks.shadow_membership import (
    ShadowMembership,
    _deviations,
    _mean_over,
    _strangers,
)
from tests.attacks.federation import play, sentences, small_model, start_of


@pytest.fixture(scope="module")
def case() -> Case:
    """A model that has learned ten sentences by heart, and two shadows of others."""
    knowledge = small_model("bottleneck")
    start, public = start_of(knowledge), knowledge.surrogate
    assert public is not None
    members = torch.arange(len(public)) % 2 == torch.tensor([[0], [1]])
    halves = [public.subset(row.nonzero()[:20, 0].tolist()) for row in members]
    own, strangers = sentences(10, seed=70), sentences(30, seed=71)
    final, *references = (
        play(knowledge, start, [half], rounds=40)[1] for half in (own, *halves)
    )
    knowledge = dataclasses.replace(
        knowledge, references=tuple(references), reference_members=members
    )
    observation = Observation(knowledge, final=final, candidates=own.joined(strangers))
    return Case(observation, Secret(own, strangers, torch.arange(40) < 10))


@pytest.mark.parametrize("method", ["rmia", "lira"])
def test_a_model_that_has_memorised_gives_its_members_away(
    case: Case, method: str
) -> None:
    attack, rng = ShadowMembership(method), torch.Generator()
    auc = attack.score(attack.run(case.observation, rng), case.secret)["auc"].mean()
    other = case.observation.knowledge.references[0]
    control = dataclasses.replace(case.observation, final=other)
    blind = attack.score(attack.run(control, rng), case.secret)["auc"].mean()
    assert auc > 0.7
    assert abs(blind - 0.5) < 0.25


def test_odds_are_those_of_the_label(case: Case) -> None:
    knowledge, final = case.observation.knowledge, case.observation.final
    some = sentences(3, seed=70)
    odds = log_odds(knowledge.model, final, some)
    batch = knowledge.model.task.collate(some, [0, 1, 2])
    logits = knowledge.model.module(**batch.inputs).detach().double()
    expected = logits.gather(1, batch.labels[:, None]) * 2 - logits.sum(1, keepdim=True)
    assert torch.allclose(odds, expected[:, 0], atol=1e-5)


def test_deviations_are_counted_from_those_who_never_saw_the_record() -> None:
    shadows = torch.tensor([[0.0, 9.0], [2.0, 4.0], [4.0, 6.0]]).double()
    stranger = torch.tensor([[True, False], [True, True], [True, True]])
    # Means 2 and 5; squares 8/3 and 1 on average, together 11/6.
    found = _deviations(torch.tensor([2.0, 6.0]).double(), shadows, stranger)
    assert found.tolist() == [0.0, pytest.approx((6 / 11) ** 0.5)]


def test_the_mean_is_over_all_where_nobody_is_chosen() -> None:
    values = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    chosen = torch.tensor([[True, False], [False, False]])
    assert _mean_over(values, chosen).tolist() == [1.0, 2.0]


def test_a_candidate_among_the_public_records_is_known_to_half(case: Case) -> None:
    knowledge = case.observation.knowledge
    public = knowledge.surrogate
    assert public is not None
    mixed = public.subset([0, 1]).joined(sentences(1, seed=72))
    expected = [[False, True, True], [True, False, True]]
    assert _strangers(knowledge, mixed).tolist() == expected


def test_without_references_it_does_not_fit() -> None:
    knowledge: Knowledge = small_model("head")
    assert ShadowMembership().misfit(knowledge) == "there are no reference models"
    with pytest.raises(ValueError, match=r"gamma >= 1"):
        ShadowMembership(gamma=0.5)
    with pytest.raises(ValueError, match=r"slope in 0\.\.1"):
        ShadowMembership(slope=2.0)
    with pytest.raises(ValueError, match="Expected candidates and a released model"):
        ShadowMembership().run(Observation(knowledge), torch.Generator())
