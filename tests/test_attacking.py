"""Every attack is given just what it needs, and says what it lacks."""

from dataclasses import replace

import pytest
import torch

from fedpeft.attacks.attack import Case
from fedpeft.audit.results import AttackResult
from fedpeft.data import Examples
from simulations.attacking import run_attacks
from simulations.observing import Stage
from tests.attacks.federation import cases_of, small_config, small_model


def _cases(*overrides: str, victims: int = 4) -> list[Case]:
    """Of a federation in memory: all of its clients in all of two rounds."""
    knowledge = replace(small_model("lora"), config=small_config(*overrides))
    return cases_of(knowledge, rounds=2, victims=victims, strangers=12)


def _results(cases: list[Case]) -> list[AttackResult]:
    knowledge = cases[0].observation.knowledge
    public = Examples(("a",), torch.tensor([0]), None, ("bad", "good"))
    stage = Stage(knowledge.config, knowledge.model, (), public, public)
    return run_attacks(stage, cases, "replay", lambda text: None)


def _attacked(cases: list[Case]) -> dict[str, AttackResult]:
    return {result.attack: result for result in _results(cases)}


FEDMIA = "audit.attacks=[{name='update_membership', measure='fedmia'}]"


def test_who_undoes_adamw_knows_how_clients_train_and_others_need_not() -> None:
    names = ["rank_budget", "head_leak", "update_membership", "exposure", "span_image"]
    cases = _cases("training.optimizer=adamw", f"audit.attacks={names}")
    letters = {name: each.threat.adversary for name, each in _attacked(cases).items()}
    assert "".join(letters[name] for name in names) == "CCAAB"


@pytest.mark.parametrize(("victims", "is_enough"), [(2, False), (3, False), (4, True)])
def test_without_strangers_to_compare_with_the_report_says_so(
    victims: int, is_enough: bool
) -> None:
    result = _attacked(_cases(FEDMIA, victims=victims))["update_membership"]
    assert (result.misfit is None) == is_enough
    assert ("auc" in result.metrics) == is_enough
    if not is_enough:
        assert result.misfit == (
            "no round shows three other clients' updates to compare with"
        )


def test_cohorts_of_two_in_rotation_are_too_small_to_compare_in() -> None:
    cases = _cases(FEDMIA)
    rounds = [(case.observation.seen[i // 2],) for i, case in enumerate(cases)]
    pairs = [
        replace(case, observation=replace(case.observation, seen=own, others=others))
        for case, own in zip(cases, rounds, strict=True)
        for others in [tuple(other for other in rounds if other is not own)]
    ]
    result = _attacked(pairs)["update_membership"]
    assert result.misfit is not None
    assert result.metrics == {}


def test_a_victim_who_is_alone_in_its_rounds_is_left_out() -> None:
    cases = _cases(FEDMIA, victims=5)
    lonely = replace(cases[0], observation=replace(cases[0].observation, others=()))
    result = _attacked([lonely, *cases[1:]])["update_membership"]
    assert result.misfit is None
    assert result.victims == 4


def test_why_there_are_no_reference_models_is_told() -> None:
    cases = _cases("audit.attacks=['shadow_membership']", "peft.share=['head']")
    result = _attacked(cases)["shadow_membership"]
    assert result.misfit == (
        "there are no reference models: [peft] share: expected none for reference "
        "models, which are compared as a whole: leave shadow_membership out"
    )


def test_aggregates_are_attacked_beside_updates_by_what_makes_do_with_them() -> None:
    names = ["rank_budget", "head_leak", "update_membership"]
    cases = _cases("audit.aggregate=true", f"audit.attacks={names}")
    results = _results(cases)
    seen = [(result.attack, result.threat.access) for result in results]
    assert seen == [
        ("rank_budget", "updates"),
        ("head_leak", "updates"),
        ("update_membership", "updates"),
        ("head_leak", "aggregate"),
        ("update_membership", "aggregate"),
    ]
    alone, together = results[2].metrics["auc"], results[4].metrics["auc"]
    assert alone.value > together.value
    assert together.value > results[4].prior_only["auc"].value


def test_where_no_later_state_is_known_there_is_no_aggregate() -> None:
    cases = [
        replace(case, observation=replace(case.observation, seen=(), others=()))
        for case in _cases("audit.aggregate=true", "audit.attacks=['head_leak']")
    ]
    assert _results(cases)[1].misfit == "what became of the rounds was not seen"
