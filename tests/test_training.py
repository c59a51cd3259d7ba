"""Local training: what reaches the engine, and what becomes of its gradients."""

from types import SimpleNamespace

import pytest
import torch

from fedpeft.data import Encoded
from fedpeft.model import TaskModel, trainable_state
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import Lora
from fedpeft.privacy import DpSgd
from fedpeft.sections import TrainingSection
from fedpeft.tasks import TextClassification
from fedpeft.tensors import flatten
from fedpeft.training import example_losses, train_locally
from tests.helpers import Toy, toy, toy_batch

SGD = TrainingSection(optimizer="sgd", learning_rate=0.5, batch_size=4)
CLIP = 0.05


def _examples(batch: int = 6) -> Encoded:
    ids, mask, labels = toy_batch(batch)
    lengths = mask.sum(1).tolist()
    pairs = zip(ids, lengths, strict=True)
    return Encoded([row[:length] for row, length in pairs], labels)


def _task(case: Toy) -> TaskModel:
    task = TextClassification(SimpleNamespace(pad_token_id=0), 32)
    return TaskModel(case.model, case.operations, task, "fingerprint", {})


def _train(batches, noise, section=SGD) -> torch.Tensor:
    model = _task(toy(Lora(rank=2)))
    engine = DpSgd(CLIP, 0.0, nominal_batch=4, slack=0.0)
    engine.bind(model.module, model.operations)
    update = train_locally(
        model,
        trainable_state(model),
        _examples(),
        batches,
        engine=engine,
        noise=noise,
        section=section,
        rate_factor=1.0,
        mask_seed=0,
    )
    return flatten(update)


def _rows() -> torch.Tensor:
    """Each example's gradient by the loop."""
    case = toy(Lora(rank=2))
    losses = example_losses(_task(case), _examples(), [*range(6)], SGD)
    return loop_gradients(
        losses, [p for p in case.model.parameters() if p.requires_grad]
    )


def _clipped(row: torch.Tensor) -> torch.Tensor:
    return row * (CLIP / row.norm()).clamp(max=1.0)


def test_an_empty_batch_is_a_step() -> None:
    update = _train([[], []], lambda total, _: total + 1)
    # Two steps of noise 1 over the nominal batch of 4, at a learning rate of 0.5.
    assert torch.allclose(update, torch.full_like(update, -2 * 0.5 / 4))


@pytest.mark.parametrize("chunk", [6, 4, 3])
def test_a_persons_rows_are_clipped_as_one(chunk: int) -> None:
    units = [[0, 3, 5], [1, 2], [4]]
    sums: list[torch.Tensor] = []
    section = SGD.model_copy(update={"max_physical_batch": chunk})
    _train([units], lambda total, _: sums.append(total.clone()) or total, section)
    rows = _rows()
    expected = sum(_clipped(rows[unit].sum(0)) for unit in units)
    assert (rows.norm(dim=1) > CLIP).all()
    assert relative_error(sums[0], expected) < 1e-4
    assert sums[0].norm() <= 3 * CLIP * (1 + 1e-5)


def test_every_example_of_a_step_counts_once() -> None:
    sums: list[torch.Tensor] = []
    section = SGD.model_copy(update={"max_physical_batch": 2})
    batch = [[index] for index in range(6)]
    _train([batch], lambda total, _: sums.append(total.clone()) or total, section)
    expected = sum(_clipped(row) for row in _rows())
    assert relative_error(sums[0], expected) < 1e-4


def test_an_update_is_minus_the_rate_times_the_mean_gradient() -> None:
    update = _train([[[0], [1]]], lambda total, _: total)
    rows = _rows()
    expected = -0.5 * (_clipped(rows[0]) + _clipped(rows[1])) / 4
    assert relative_error(update, expected) < 1e-3
