"""Frozen features: the same results from the cache as without it, and in bounds."""

import os
from types import SimpleNamespace

import pytest
import torch

from fedpeft.data import Encoded
from fedpeft.features import FeatureFile, KeptFeatures, keep_features
from fedpeft.interfaces import PeftMethod
from fedpeft.model import TaskModel
from fedpeft.peft import SSF, Bias, Head, Lora, Prefix, Prompt, Side, SSFPool
from fedpeft.sections import TrainingSection
from fedpeft.tasks import ImageClassification, TextClassification
from fedpeft.training import example_losses
from tests.helpers import toy, toy_batch, toy_images

SGD = TrainingSection(learning_rate=1.0, batch_size=4)
ROOM = 1 << 20


def model_of(family: str, method: PeftMethod) -> TaskModel:
    case = toy(method, family=family)
    channels = (0.5, 0.5, 0.5)
    task = TextClassification(SimpleNamespace(pad_token_id=0), 32)
    if family == "vit":
        task = ImageClassification(32, channels, channels)
    return TaskModel(case.model, case.operations, task, "fingerprint", {})


def examples_of(family: str, batch: int = 6) -> Encoded:
    if family == "vit":
        images, labels = toy_images(batch)
        pixels = (images.movedim(1, 3).clamp(-2, 2) * 60 + 120).to(torch.uint8)
        return Encoded(list(pixels), labels)
    ids, mask, labels = toy_batch(batch)
    lengths = mask.sum(1).tolist()
    return Encoded([row[:n] for row, n in zip(ids, lengths, strict=True)], labels)


def kept_of(model: TaskModel, examples: Encoded, room: int = ROOM) -> KeptFeatures:
    kept = keep_features(model, examples, "fp32", FeatureFile(room))
    assert kept is not None
    return kept


CASES = [
    Head(),
    Bias(first_layer=1),
    Lora(rank=2, first_layer=1),
    SSF(first_layer=1),
    SSFPool(),
    SSFPool(head="pooled"),
    SSFPool(pool_size=5, top_k=3, first_layer=1),
    Side(),
    Side(reduction=4, first_layer=1),
]


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
@pytest.mark.parametrize("method", [*CASES, Prefix(length=2, first_layer=1)], ids=str)
def test_losses_from_kept_features_are_those_without(
    family: str, method: PeftMethod
) -> None:
    model, examples = model_of(family, method), examples_of(family)
    kept, indices = kept_of(model, examples), [4, 0, 3]
    expected = example_losses(model, examples, indices, SGD)
    for _ in range(2):  # computed, then read
        losses = example_losses(model, examples, indices, SGD, kept)
        assert torch.allclose(losses, expected, atol=1e-5)
    gradients = [
        torch.autograd.grad(
            each.sum(), [p for p in model.module.parameters() if p.requires_grad]
        )
        for each in (losses, expected)
    ]
    for actual, wanted in zip(*gradients, strict=True):
        assert torch.allclose(actual, wanted, atol=1e-5)


def test_whether_it_was_kept_changes_no_bit() -> None:
    model, examples = model_of("bert", Lora(rank=2, first_layer=1)), examples_of("bert")
    roomy, full = kept_of(model, examples), kept_of(model, examples, room=0)
    roomy.of([0, 1, 2])
    assert torch.equal(roomy.of([2, 5]), full.of([2, 5]))


def test_features_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = model_of("bert", Head()), examples_of("bert")
    kept = kept_of(model, examples)
    first = kept.of([0, 1, 2, 3, 4, 5])
    monkeypatch.setattr(model.module, "keep", None)  # would fail if it were called
    assert torch.equal(kept.of([0, 1, 2, 3, 4, 5]), first)


@pytest.mark.parametrize(
    "method", [Lora(rank=2), Prompt(length=2), SSF()], ids=["lora", "prompt", "ssf"]
)
def test_what_trains_from_the_first_layer_on_keeps_nothing(method: PeftMethod) -> None:
    model = model_of("bert", method)
    assert keep_features(model, examples_of("bert"), "fp32", FeatureFile(ROOM)) is None


def test_a_file_stays_within_its_bound() -> None:
    file = FeatureFile(100)
    first = torch.arange(10.0)
    assert file.append(first) == 0
    assert file.append(torch.zeros(20)) is None
    assert file.append(torch.ones(15)) == 40
    assert file.size_bytes == 100
    assert torch.equal(file.read(0, first.shape), first)
    assert torch.equal(file.read(40, torch.Size((3, 5))), torch.ones(3, 5))


@pytest.mark.parametrize("written", [None, 0, 3])
def test_a_full_disk_keeps_nothing_more(
    monkeypatch: pytest.MonkeyPatch, written: int | None
) -> None:
    def full(*args: object) -> int:
        if written is None:
            raise OSError(28, "No space left on device")
        return written  # the last bytes that went on

    file = FeatureFile(ROOM)
    monkeypatch.setattr(os, "pwrite", full)
    assert file.append(torch.zeros(4)) is None
    monkeypatch.undo()
    assert file.append(torch.zeros(4)) is None


def test_what_was_kept_cannot_be_changed_by_who_reads_it() -> None:
    file = FeatureFile(ROOM)
    place = file.append(torch.zeros(4))
    assert place is not None
    file.read(place, torch.Size((4,))).add_(1)
    assert torch.equal(file.read(place, torch.Size((4,))), torch.zeros(4))
