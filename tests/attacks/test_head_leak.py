"""Labels and features out of the head, whatever the method."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedpeft.attacks.attack import Case, Observation, Secret, Seen
from fedpeft.attacks.head_leak import HeadLeak
from tests.attacks.federation import (
    cases_of,
    sentences,
    small_config,
    small_model,
    start_of,
    trained,
)
from tests.attacks.test_span_image import federation

RNG = torch.Generator()


def scores(case: Case, attack: HeadLeak) -> dict[str, list[float]]:
    found = attack.score(attack.run(case.observation, RNG), case.secret)
    return {name: value.tolist() for name, value in found.items()}


@pytest.mark.parametrize("method", ["head", "bias", "ssf", "lora"])
def test_one_record_is_picked_out_of_many(method: str) -> None:
    knowledge = small_model(method)
    assert HeadLeak().misfit(knowledge) is None
    for case in cases_of(knowledge, rounds=1, victims=3, strangers=40):
        found = scores(case, HeadLeak())
        assert found["identification_top1"] == [1.0]
        assert found["label_accuracy"] == [1.0]
        assert found["feature_cosine"] == [pytest.approx(1, abs=1e-4)]


def test_an_images_feature_is_picked_out_too(vit_s: Path, fashion_mnist: Path) -> None:
    first, second, _ = federation()
    decoys = Secret(first.secret.examples, second.secret.examples)
    found = scores(replace(first, secret=decoys), HeadLeak())
    assert found["identification_top1"] == [1.0]
    assert found["label_accuracy"] == [1.0]


def test_another_clients_update_picks_nobody_out() -> None:
    cases = cases_of(small_model("lora"), rounds=1, victims=4, strangers=40)
    guesses = [HeadLeak().run(case.observation, RNG) for case in cases]
    shifted = zip([*guesses[1:], guesses[0]], cases, strict=True)
    hits = [
        float(HeadLeak().score(guess, case.secret)["identification_top1"])
        for guess, case in shifted
    ]
    assert sum(hits) <= 1


def test_random_features_pick_out_no_more_than_a_lot_however_many() -> None:
    case = cases_of(small_model("lora"), rounds=1, victims=2, strangers=1)[0]
    guess = HeadLeak().run(case.observation, RNG)
    secret = Secret(sentences(100, seed=4), sentences(49, seed=5))
    rng, hits = torch.Generator().manual_seed(0), []
    for _ in range(20):
        many = torch.randn(100, guess.features.shape[1], generator=rng)
        found = HeadLeak().score(replace(guess, features=many), secret)
        hits.append(float(found["identification_top1"].mean()))
    # One of 50 is 2 %; in the column of its best feature alone a record wins 7 %.
    assert sum(hits) / len(hits) <= 0.04


def test_two_records_of_one_class_are_labelled_both() -> None:
    knowledge = small_model("head")
    records = sentences(20, seed=4)
    pair = records.subset((records.labels == 1).nonzero()[:2, 0].tolist())
    state = start_of(knowledge)
    seen = Seen(1, state, trained(knowledge, state, pair))
    case = Case(Observation(knowledge, (seen,)), Secret(pair, sentences(5, seed=7)))
    found = scores(case, HeadLeak(num_records=2))
    assert found["label_accuracy"] == [1.0, 1.0]
    # Both are in one feature, so neither is it.
    assert max(found["feature_cosine"]) < 0.9999


def test_the_baseline_is_a_lot() -> None:
    case = cases_of(small_model("lora"), rounds=1, victims=2, strangers=39)[0]
    found = HeadLeak().baseline(case.observation, case.secret, RNG)
    assert found["identification_top1"].tolist() == [pytest.approx(1 / 40)]
    assert found.keys() == HeadLeak.metrics.keys()


def test_records_of_several_labels_do_not_fit() -> None:
    config = small_config("data.multi_label=true")
    knowledge = replace(small_model("lora"), config=config)
    assert HeadLeak().misfit(knowledge) == "its records have several labels"


def test_no_label_of_a_cohort_is_anybodys() -> None:
    case = cases_of(small_model("lora"), rounds=1, victims=3, strangers=9)[0]
    knowledge = replace(case.observation.knowledge, sees_aggregates=True)
    observation = replace(case.observation, knowledge=knowledge)
    found = scores(replace(case, observation=observation), HeadLeak())
    rest = HeadLeak.metrics.keys() - {"label_accuracy"}
    assert found.keys() == rest
    assert HeadLeak().baseline(observation, case.secret, RNG).keys() == rest
