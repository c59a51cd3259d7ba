"""Exposure by arithmetic, and the directions that updates then really show."""

from pathlib import Path

import pytest
import torch

from fedpeft.attacks.rank_budget import ObservedRank, RankBudget, rank_budget
from fedpeft.config import RunConfig
from tests.attacks.federation import cases_of, small_config, small_model
from tests.attacks.test_span_image import federation


def budget(rank: int, *overrides: str) -> RankBudget:
    """Of query and value, over three rounds, in 32 features."""
    model = small_model("lora", rank=rank).model
    (found,) = rank_budget(model, small_config("data.max_length=16", *overrides))
    return found


def test_ranks_add_up_over_matrices_and_rounds() -> None:
    found = budget(2)
    assert (found.rows, found.needed, found.width) == (2 * 2 * 3, 16, 32)
    assert found.verdict == "ranked"


def test_enough_rows_expose_every_position() -> None:
    assert budget(4).verdict == "exact"


def test_a_batch_that_fills_all_features_hides_its_tokens_at_full_length() -> None:
    found = budget(4, "training.batch_size=2")
    assert found.needed == found.width
    assert found.verdict == "infeasible"
    assert found.detail.startswith("32 positions, a full batch at full length, fill")
    assert "shorter records, or fewer at a time, may still be told" in found.detail


def test_a_shorter_record_of_such_a_batch_shows_all_its_directions() -> None:
    knowledge = small_model("lora", rank=4)
    config = small_config("data.max_length=32")
    assert rank_budget(knowledge.model, config)[0].verdict == "infeasible"
    case = cases_of(knowledge, rounds=3, victims=2, strangers=1)[0]
    length = len(case.secret.examples.inputs[0])
    assert length < 32
    guess = ObservedRank().run(case.observation, torch.Generator())
    assert guess.directions == length


def test_a_client_of_half_the_rounds_shows_half() -> None:
    assert budget(2, "cohort.size=2", "run.rounds=4").rows == 2 * 2 * 2


@pytest.mark.parametrize("method", ["head", "bias", "ssf"])
def test_without_a_matrix_there_is_no_budget(method: str) -> None:
    assert rank_budget(small_model(method).model, small_config()) == []


def test_a_frozen_a_leaves_as_many_features_as_its_rank() -> None:
    model = small_model("lora", rank=4, freeze_a=True).model
    (found,) = rank_budget(model, small_config("data.max_length=16"))
    assert found.width == 4
    assert found.verdict == "infeasible"


def test_images_say_whether_patches_are_fixed(vit_s: Path, fashion_mnist: Path) -> None:
    knowledge = federation()[0].observation.knowledge
    config = RunConfig.from_toml(knowledge.config.to_toml(), ("run.rounds=20",))
    (found,) = rank_budget(knowledge.model, config)
    # A picture of 28 x 28 is four patches of 14 x 14 in three colours, and a class.
    assert found.needed == 5
    assert "In colour 5 tokens + 588 pixels a patch + 1 > 384 features" in found.detail


def test_updates_show_as_many_directions_as_the_tokens_have() -> None:
    cases = cases_of(small_model("lora", rank=4), rounds=3, victims=2, strangers=1)
    attack = ObservedRank()
    for case in cases:
        guess = attack.run(case.observation, torch.Generator())
        assert guess.directions == len(case.secret.examples.inputs[0])
        assert attack.score(guess, case.secret)["observable_share"].tolist() == [1.0]
        nothing = attack.baseline(case.observation, case.secret, torch.Generator())
        assert nothing["observable_share"].tolist() == [0.0]
