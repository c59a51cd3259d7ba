"""Strings that an auditor plants, and asks for after a run on them."""

from pathlib import Path

import pytest
import torch

from fedpeft.attacks.exposure import Exposure
from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.judging import judge
from fedpeft.config import RunConfig
from fedpeft.data import load
from simulations.planting import planted_cases, random_strings, with_planted

CHAT = """
[run]
rounds = 3
workers = 0
[data]
name = "review-writing"
max_examples = 12
test_fraction = 0.2
max_length = 48
[partition]
name = "by-group"
num_clients = 2
[model]
backbone = "smollm2"
task = "causal-lm"
[peft]
name = "lora"
rank = 4
first_layer = 29
[training]
optimizer = "adamw"
learning_rate = 0.01
batch_size = 4
[cohort]
size = 2
[privacy]
unit = "none"
[audit]
decoys = 6
"""


def test_strings_are_planted_among_the_records(
    rotten_tomatoes: Path, tmp_path: Path
) -> None:
    config = RunConfig.from_toml(CHAT)
    strings = random_strings(config, 5)
    planted = with_planted(config, strings, tmp_path / "planted.jsonl")
    contents = load(planted.data).contents
    assert len(contents) == 12 + 5
    assert set(strings) < set(contents)
    assert set(load(config.data).contents) < set(contents)
    assert len({string.completion for string in strings}) == 5
    assert {len(string.completion) for string in strings} == {8}


@pytest.mark.slow
def test_exposure_is_judged_beside_the_model_before_it_was_trained(
    smollm2: Path, rotten_tomatoes: Path, tmp_path: Path
) -> None:
    cases = planted_cases(RunConfig.from_toml(CHAT), tmp_path)
    assert 2 <= len(cases) <= 16
    for case in cases:
        assert case.secret.is_member.tolist() == [True] + 6 * [False]
        texts = [t.tolist() for t in case.observation.candidates.inputs]
        assert all(texts.count(text) == 1 for text in texts)
    granted = ThreatModel("A", "final-model", "extract")
    result = judge("exposure", Exposure(), cases[:4], granted, seed=0)
    assert 0 <= result.metrics["exposure"].value <= torch.tensor(7.0).log2()
    start = cases[0].observation.knowledge.references[0]
    assert any(
        not torch.equal(tensor, start[name])
        for name, tensor in cases[0].observation.final.items()
    )
    assert result.metrics["exposure"].value > result.prior_only["exposure"].value
