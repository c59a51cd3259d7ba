"""Sentences out of the first block's adapters: exact if they fit, blind under noise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedpeft.attacks._reading import local_steps, read
from fedpeft.attacks._span import find_readers, first_input, rounding, span_of
from fedpeft.attacks._text_inputs import token_inputs
from fedpeft.attacks._text_scores import text_scores
from fedpeft.attacks.attack import Case, Knowledge, Observation, Secret, Seen
from fedpeft.attacks.span_text import SpanText
from fedpeft.config import RunConfig
from fedpeft.data import Encoded, load
from fedpeft.model import TaskModel, build_model, trainable_state
from fedpeft.privacy import NonPrivate
from fedpeft.tensors import Tensors, add, scale
from fedpeft.training import train_locally
from tests.attacks.federation import small_config, small_model

SCENARIO = """
[run]
rounds = 3
[data]
name = "rotten-tomatoes"
nominal_examples = 1
[partition]
name = "iid"
num_clients = 2
[model]
backbone = "minilm"
[peft]
name = "lora"
rank = 8
[training]
optimizer = "sgd"
learning_rate = 0.3
batch_size = 1
[cohort]
size = 2
[privacy]
unit = "none"
"""
ADAMW = ("training.optimizer=adamw", "training.learning_rate=0.001")
Mangle = Callable[[Tensors], Tensors]


@pytest.fixture(scope="module")
def stage(minilm: Path, rotten_tomatoes: Path) -> tuple[TaskModel, Encoded]:
    """The real model off the identity, and real sentences."""
    config = RunConfig.from_toml(SCENARIO)
    model = build_model(config, 2)
    return model, model.task.encode(load(config.data).subset(range(500)))


def victims(
    stage: tuple[TaskModel, Encoded], *overrides: str, mangle: Mangle = dict
) -> list[Case]:
    """Two clients of one sentence each, seen in all of three rounds."""
    model, examples = stage
    config = RunConfig.from_toml(SCENARIO, overrides)
    short = [i for i, ids in enumerate(examples.inputs[:20]) if len(ids) <= 22]
    parts = [examples.subset([place]) for place in short[:2]]
    knowledge = Knowledge(model, config, examples.subset(range(20, 500)))
    rng = torch.Generator().manual_seed(0)
    state = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=rng)
        for name, tensor in trainable_state(model).items()
    }
    seen: list[list[Seen]] = [[], []]
    for server_round in (1, 2, 3):
        updates = [_trained(model, config, state, part) for part in parts]
        for mine, update in zip(seen, updates, strict=True):
            mine.append(Seen(server_round, state, mangle(update)))
        state = add(state, scale(add(*updates), 0.5))
    return [
        Case(Observation(knowledge, tuple(rounds)), Secret(part))
        for rounds, part in zip(seen, parts, strict=True)
    ]


def _trained(
    model: TaskModel, config: RunConfig, state: Tensors, part: Encoded
) -> Tensors:
    engine = NonPrivate()
    engine.bind(model.module, model.operations)
    return train_locally(
        model,
        state,
        part,
        [[[0]]] * local_steps(config),
        engine=engine,
        noise=lambda total, deviation: total,
        section=config.training,
        rate_factor=1.0,
        mask_seed=0,
    )


def attacked(case: Case, attack: SpanText) -> dict[str, float]:
    guess = attack.run(case.observation, torch.Generator())
    return {n: float(v.mean()) for n, v in attack.score(guess, case.secret).items()}


@pytest.mark.parametrize("overrides", [(), ADAMW, ("training.local_epochs=3",)])
def test_sentences_are_read_word_by_word(stage, overrides: tuple[str, ...]) -> None:
    attack = SpanText()
    for case in victims(stage, *overrides):
        assert attack.misfit(case.observation.knowledge) is None
        assert attacked(case, attack)["exact_match"] == 1


def test_what_is_read_can_be_looked_at(stage) -> None:
    case, _ = victims(stage)
    ids = case.secret.examples.inputs[0]
    whole = ids[:, None].expand(-1, 10)
    truth, read_text = SpanText().shown(whole, case)
    assert (
        truth
        == read_text
        == case.observation.knowledge.model.task.tokenizer.decode(ids[1:-1])
    )
    assert SpanText().shown(whole[:0], case) == (truth, "")


def test_another_clients_updates_tell_next_to_nothing(stage) -> None:
    mine, other = victims(stage)
    guess = SpanText().run(other.observation, torch.Generator())
    assert float(SpanText().score(guess, mine.secret)["token_top1"]) < 0.2


def test_what_drowns_in_noise_is_guessed_as_without_updates(stage) -> None:
    rng = torch.Generator().manual_seed(1)

    def drown(update: Tensors) -> Tensors:
        return {
            name: tensor + 10 * torch.randn(tensor.shape, generator=rng)
            for name, tensor in update.items()
        }

    case = victims(stage, mangle=drown)[0]
    config = RunConfig.from_toml(SCENARIO, ("privacy.unit=example",))
    knowledge = replace(case.observation.knowledge, config=config)
    case = replace(case, observation=replace(case.observation, knowledge=knowledge))
    baseline = SpanText().baseline(case.observation, case.secret, torch.Generator())
    assert attacked(case, SpanText()) == {n: float(v) for n, v in baseline.items()}


def test_a_tenth_of_noise_leaves_more_than_a_control(stage) -> None:
    rng = torch.Generator().manual_seed(1)

    def disturb(update: Tensors) -> Tensors:
        return {
            name: tensor
            + 0.1
            * tensor.norm()
            / tensor.numel() ** 0.5
            * torch.randn(tensor.shape, generator=rng)
            for name, tensor in update.items()
        }

    scores = [
        attacked(case, SpanText(relative_noise=0.1, tries=0))["token_top10"]
        for case in victims(stage, mangle=disturb)
    ]
    assert sum(scores) / 2 > 0.3


@pytest.mark.parametrize("method", ["head", "bias"])
def test_methods_that_read_no_token_do_not_fit(method: str) -> None:
    assert "no trained matrix" in (SpanText().misfit(small_model(method)) or "")


def test_a_frozen_a_hides_the_tokens_behind_its_rank() -> None:
    misfit = SpanText().misfit(small_model("lora", rank=2, freeze_a=True))
    assert misfit == "what trained matrices read first depends on more than the token"


def test_a_block_above_the_first_does_not_fit() -> None:
    misfit = SpanText().misfit(small_model("lora", rank=2, first_layer=1))
    assert misfit == "what trained matrices read first depends on more than the token"


def test_inputs_are_those_that_the_first_block_is_given(stage) -> None:
    model, examples = stage
    ids = examples.inputs[0]
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    model.module.eval()
    readers = find_readers(model.module, model.operations, inputs)
    assert [reader.name.split(".")[-4] for reader in readers] == ["query", "value"]
    ours = token_inputs(model.module, 64)
    assert ours is not None
    given = first_input(model.module, readers[0], inputs)[0].double()
    assert torch.allclose(ours.sentence(ids), given, atol=1e-5)
    # A token lies within its own direction, and half within one at 45 degrees.
    own = given[3] / given[3].norm()
    shares = ours.shares(own[None], ids[3:4]).at(3)
    assert shares.tolist() == [[pytest.approx(1, abs=1e-4)]]


def test_rounding_is_that_of_the_parameter() -> None:
    state = {"a": torch.tensor([1.0, 1.0, 4.0])}
    update = {"a": torch.tensor([0.5, 1e-9, 1e-9])}
    units = rounding(state, update)["a"] * 12**0.5 * 2**23
    assert units.tolist() == pytest.approx([1, 1, 4])


def test_adams_first_step_gives_the_gradients_size_back() -> None:
    gradient = torch.tensor([3e-9, -1e-8, 4e-8], dtype=torch.float64)
    steps = -gradient / (gradient.abs() + 1e-8)
    config = small_config(*ADAMW, "training.head_learning_rate=0.02")
    knowledge = replace(small_model("bias"), config=config)
    body = "backbone.encoder.layer.0.attention.self.query.bias"
    update = {body: 1e-3 * steps, "head.bias": 0.02 * steps}
    state = {name: torch.zeros(3) for name in update}
    for values in read(Seen(1, state, update), knowledge).values.values():
        assert (values * -1e-8).tolist() == pytest.approx(gradient.tolist(), rel=1e-4)


def test_a_span_holds_its_rows_and_nothing_beside_them() -> None:
    span = span_of(1e6 * torch.tensor([[1.0, 0, 0], [1, 1, 0]]))
    tokens = torch.tensor([[0.0, 2, 0], [0, 0, 3], [0, 1, 1]])
    outside = span.residuals(tokens).tolist()
    assert outside == pytest.approx([0, 1, 0.5], abs=1e-6)
    assert span.rank() == 2


def test_scores_count_places_without_the_special_tokens() -> None:
    truth = Encoded([torch.tensor([1, 5, 6, 7, 8, 2])], torch.zeros(1))
    guess = torch.tensor([[1, 1], [5, 0], [9, 6], [7, 0], [2, 2]])
    scores = {name: float(value) for name, value in text_scores(guess, truth).items()}
    # Of 5 6 7 8, guessed as 5 9 7: two at their place, one more second; 5 7 in order.
    assert scores == {
        "token_top1": 0.5,
        "token_top10": 0.75,
        "rouge_l": pytest.approx(4 / 7),
        "exact_match": 0.0,
    }
