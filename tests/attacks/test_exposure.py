"""A planted string that was learned ranks first, an unlearned one anywhere."""

import pytest
import torch
from torch import nn

from fedpeft.attacks.attack import Knowledge, Observation, Secret, Seen
from fedpeft.attacks.exposure import Exposure, _extrapolated
from fedpeft.data import Encoded
from fedpeft.model import TaskModel, trainable_state
from fedpeft.peft import Bottleneck
from fedpeft.tasks.causal_lm import CausalLanguageModelling, CausalLM
from fedpeft.tensors import add
from tests.attacks.federation import small_config, small_model, trained
from tests.helpers import VOCABULARY, tiny_llama


class _Tokenizer:
    pad_token_id = 0


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = tiny_llama()
        operations = Bottleneck(width=8).attach(backbone)
        output = nn.Linear(32, VOCABULARY).requires_grad_(False)
    task = CausalLanguageModelling(_Tokenizer(), 16)
    model = TaskModel(CausalLM(backbone, output), operations, task, "tiny-llama", {})
    return Knowledge(model, small_config("training.learning_rate=1.0"))


@pytest.fixture(scope="module")
def codes() -> Encoded:
    """The same four words and six random ones, which are to be learned."""
    rng = torch.Generator().manual_seed(1)
    phrase = torch.tensor([5, 6, 7, 8])
    words = torch.randint(3, VOCABULARY, (64, 6), generator=rng)
    return Encoded([torch.cat((phrase, w)) for w in words], torch.full((64,), 4))


@pytest.fixture(scope="module")
def learned(knowledge: Knowledge, codes: Encoded) -> list[Seen]:
    """Before and after: 30 steps on the first code."""
    state, seen = trainable_state(knowledge.model), []
    for server_round in range(1, 31):
        update = trained(knowledge, state, codes.subset([0]))
        seen.append(Seen(server_round, state, update))
        state = add(state, update)
    return seen


def _secret(codes: Encoded) -> Secret:
    return Secret(codes.subset([0]), None, torch.arange(64) < 1)


def test_what_was_learned_ranks_first(
    knowledge: Knowledge, codes: Encoded, learned: list[Seen], rng: torch.Generator
) -> None:
    observation = Observation(knowledge, tuple(learned), candidates=codes)
    scores = Exposure().score(Exposure().run(observation, rng), _secret(codes))
    assert scores["exposure"].tolist() == [6.0]
    assert float(scores["exposure_extrapolated"]) > 6


def test_what_nobody_planted_is_not_exposed(
    knowledge: Knowledge, codes: Encoded, learned: list[Seen], rng: torch.Generator
) -> None:
    before = Observation(knowledge, final=learned[0].state, candidates=codes)
    found = Exposure().score(Exposure().run(before, rng), _secret(codes))
    assert float(found["exposure"]) < 4
    chances = [
        float(Exposure().baseline(before, _secret(codes), rng)["exposure"])
        for _ in range(200)
    ]
    # Of a uniform rank: log2 of the number minus the mean logarithm, about log2 e.
    assert sum(chances) / 200 == pytest.approx(1.44, abs=0.35)


def test_the_extrapolation_of_a_normal_is_its_tail(rng: torch.Generator) -> None:
    others = torch.randn(4000, generator=rng)
    (bits,) = _extrapolated(torch.tensor([-2.0]), others).tolist()
    assert bits == pytest.approx(5.46, abs=0.3)  # 2.3 % lie below


def test_few_strings_are_not_extrapolated() -> None:
    secret = Secret(None, is_member=torch.arange(4) < 1)
    scores = Exposure().score(torch.tensor([1.0, 2.0, 3.0, 4.0]), secret)
    assert {name: values.tolist() for name, values in scores.items()} == {
        "exposure": [2.0]
    }


def test_what_cannot_be_asked_is_one_clear_line(codes: Encoded) -> None:
    classifier = small_model("head")
    assert Exposure().misfit(classifier) == "the model does not go on with texts"
    with pytest.raises(ValueError, match="Expected candidates and a model"):
        Exposure().run(Observation(classifier, candidates=codes), torch.Generator())
    with pytest.raises(ValueError, match="Expected planted strings"):
        Exposure().score(torch.ones(2), Secret(codes))
