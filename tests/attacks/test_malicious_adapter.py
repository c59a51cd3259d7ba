"""Bins made of an adapter give up tokens; the detector sees the bins."""

import dataclasses

import pytest
import torch

from fedpeft.attacks.attack import Case, Knowledge, Observation, Secret, Seen
from fedpeft.attacks.detector import inspect
from fedpeft.attacks.malicious_adapter import MaliciousAdapter
from fedpeft.model import shared_state
from fedpeft.tensors import Tensors
from tests.attacks.federation import sentences, small_config, small_model, trained

ATTACK = MaliciousAdapter(depth=2, tolerance=0.2)
VICTIMS = 8


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    found = small_model("bottleneck", width=16)
    with torch.no_grad():  # as loud as a trained backbone: tokens far from each other
        for name, weight in found.model.module.named_parameters():
            if "dense" in name and name.endswith("weight") and weight.shape[0] != 16:
                weight.mul_(10)
            if "word_embeddings" in name:
                weight.mul_(10)
    return found


@pytest.fixture(scope="module")
def start(knowledge: Knowledge) -> Tensors:
    return shared_state(knowledge.model)


@pytest.fixture(scope="module")
def crafted(knowledge: Knowledge, start: Tensors) -> Tensors:
    state = ATTACK.craft(knowledge, torch.Generator().manual_seed(0))
    assert state is not None
    return state


@pytest.fixture(scope="module")
def guesses(knowledge: Knowledge, crafted: Tensors) -> list[tuple[object, Secret]]:
    found = []
    for client in range(VICTIMS):
        own = sentences(1, seed=200 + client)
        update = trained(knowledge, crafted, own)
        observation = Observation(knowledge, (Seen(1, crafted, update),))
        guess = ATTACK.run(observation, torch.Generator())
        found.append((guess, Secret(own, sentences(40, seed=60))))
    return found


def _mean(guesses: list, metric: str, shift: int = 0) -> float:
    shifted = [*guesses[shift:], *guesses[:shift]]
    pairs = zip(guesses, shifted, strict=True)
    scores = [ATTACK.score(g, secret)[metric] for (_, secret), (g, _) in pairs]
    return float(torch.cat(scores).mean())


def test_a_record_is_found_among_decoys_and_the_control_is_not(guesses: list) -> None:
    assert _mean(guesses, "identification_top1") >= 0.8
    assert _mean(guesses, "identification_top1", shift=1) <= 0.3


def test_what_is_caught_is_a_token_s_input(guesses: list) -> None:
    near = []
    for guess, secret in guesses:
        row = [guess.distances(secret.examples), guess.distances(secret.decoys).min()]
        near.append(float(row[0] - row[1]))
    assert sum(near) / len(near) < -0.1


def test_tokens_are_named_beyond_the_commonest(
    guesses: list, rng: torch.Generator
) -> None:
    observation = Observation(small_model("bottleneck"))
    trivial = [
        float(ATTACK.baseline(observation, secret, rng)["token_top1"])
        for _, secret in guesses
    ]
    assert _mean(guesses, "token_top1") > sum(trivial) / len(trivial)
    chance = ATTACK.baseline(observation, guesses[0][1], rng)["identification_top1"]
    assert chance.tolist() == [pytest.approx(1 / 41)]


def test_the_detector_names_the_bins(start: Tensors, crafted: Tensors) -> None:
    found = {finding.kind for finding in inspect(crafted, start, small_config(), 2)}
    assert {"same-rows", "ladder"} <= found
    kinds = {f.kind for f in inspect(crafted, start, small_config(), 1)}
    assert "not-the-start" in kinds


def test_linear_factors_make_no_bins(rng: torch.Generator) -> None:
    lora = small_model("lora")
    assert "bias before its nonlinearity" in str(ATTACK.misfit(lora))
    assert ATTACK.craft(lora, rng) is None


def test_without_public_records_it_does_not_fit(knowledge: Knowledge) -> None:
    alone = dataclasses.replace(knowledge, surrogate=None)
    assert "public records" in str(ATTACK.misfit(alone))


def test_named_tokens_are_shown_beside_the_text(guesses: list) -> None:
    guess, secret = guesses[0]
    case = Case(Observation(small_model("bottleneck")), secret)
    truth, named = ATTACK.shown(guess, case)
    words = secret.examples.inputs[0][1:-1].tolist()
    assert truth == " ".join(f"w{number}" for number in words)
    assert set(named.split()) == {f"w{number}" for number in guess.tokens}
    images = dataclasses.replace(guess, tokens=None)
    assert ATTACK.shown(images, case) is None
