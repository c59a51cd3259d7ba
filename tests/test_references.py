"""Reference models: halves of public records, trained as the run trains."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fedpeft.attacks.attack import Knowledge
from fedpeft.data.rotten_tomatoes import load
from fedpeft.errors import ConfigError, RunError
from fedpeft.model import build_model, shared_state
from simulations.references import with_references
from tests.helpers import small_config

HEAD = ("peft={name='head'}", "run.rounds=2", "data.nominal_examples=4")
NONE = ("privacy.unit=none", "compression={name='dense'}", "training.batch_size=4")


@pytest.fixture(scope="module")
def plain(small_reviews: Path) -> Knowledge:
    config = small_config(small_reviews, *HEAD, *NONE)
    model = build_model(config, 2)
    public = model.task.encode(load().subset(range(48)))
    return Knowledge(model, config, public)


def _references(knowledge: Knowledge, number: int = 2) -> Knowledge:
    return with_references(knowledge, 2, number=number)


def test_pairs_share_the_records_between_them(plain: Knowledge) -> None:
    found = _references(plain, number=4)
    members = found.reference_members
    assert members is not None
    # Four clients of four records each.
    assert members.sum(1).tolist() == [16, 16, 16, 16]
    assert not (members[0] & members[1]).any()
    assert not (members[2] & members[3]).any()
    assert not torch.equal(members[0], members[2])


def test_equal_seeds_train_equal_models_and_no_two_are_alike(plain: Knowledge) -> None:
    once, again = _references(plain), _references(plain)
    start = shared_state(build_model(plain.config, 2))
    for state, same in zip(once.references, again.references, strict=True):
        assert state.keys() == start.keys()
        assert all(torch.equal(state[name], same[name]) for name in state)
        assert any(not torch.equal(state[name], start[name]) for name in state)
    first, second = once.references
    assert not torch.equal(first["head.weight"], second["head.weight"])


@pytest.mark.parametrize("unit", ["example", "client"])
def test_privacy_compression_and_feedback_are_those_of_the_run(
    plain: Knowledge, small_reviews: Path, unit: str
) -> None:
    more = (f"privacy.unit={unit}", "training.batch_size=4")
    config = small_config(small_reviews, *HEAD, *more)
    private = _references(dataclasses.replace(plain, config=config))
    assert all(t.isfinite().all() for s in private.references for t in s.values())
    weights = private.references[0]["head.weight"]
    assert not torch.equal(weights, _references(plain).references[0]["head.weight"])


def test_what_cannot_be_trained_is_one_clear_line(plain: Knowledge) -> None:
    with pytest.raises(ValueError, match="even number of models, got 3"):
        _references(plain, number=3)
    few = dataclasses.replace(plain, surrogate=plain.surrogate.subset([0, 1]))
    with pytest.raises(ValueError, match="Expected 8 public records or more, got 2"):
        _references(few)
    peft = plain.config.peft.model_copy(update={"share": ("head",)})
    config = plain.config.model_copy(update={"peft": peft})
    with pytest.raises(ConfigError, match=r"\[peft\] share: expected none"):
        _references(dataclasses.replace(plain, config=config))


def test_training_that_diverges_is_one_clear_line(
    plain: Knowledge, small_reviews: Path
) -> None:
    wild = (
        "training.optimizer=sgd",
        "training.learning_rate=3e38",
        "training.momentum=0.9",
        "training.local_epochs=9",
    )
    config = small_config(small_reviews, *HEAD, *NONE, *wild)
    with pytest.raises(RunError, match="their training diverged"):
        _references(dataclasses.replace(plain, config=config))
