"""What every method of the menu keeps."""

import pytest
import torch

from fedpeft.backbone import TextClassifier
from fedpeft.interfaces import PeftMethod
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import METHODS, Bias, Lora
from fedpeft.privacy import DpSgd
from tests.helpers import tiny_bert, toy, toy_batch, toy_losses

CASES: dict[str, PeftMethod] = {
    **{name: method() for name, method in METHODS.items()},
    "lora-frozen-a": Lora(rank=2, freeze_a=True),
    "lora-all-linear": Lora(rank=2, target_modules=("query", "key", "value", "dense")),
    "lora-top": Lora(rank=2, first_layer=1),
    "bias-top": Bias(first_layer=1),
    "ssf-top": METHODS["ssf"](first_layer=1),  # type: ignore[call-arg]
}
each_method = pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())


def _engine(parts: list, model: TextClassifier) -> DpSgd:  # type: ignore[type-arg]
    engine = DpSgd(clipping_norm=1.0, noise_multiplier=0.0, nominal_batch=1)
    engine.bind(model, parts)
    return engine


@each_method
def test_backbone_output_is_unchanged_at_initialisation(method: PeftMethod) -> None:
    ids, mask, _ = toy_batch(4)
    expected = tiny_bert()(ids, mask).last_hidden_state
    backbone = tiny_bert()
    method.attach(backbone)
    actual = backbone(ids, mask).last_hidden_state
    assert torch.equal(actual, expected)


@each_method
def test_exactly_the_operations_parameters_train(method: PeftMethod) -> None:
    backbone = tiny_bert()
    operations = method.attach(backbone)
    named = {id(p) for op in operations for p in op.parameters.values()}
    assert {id(p) for p in backbone.parameters() if p.requires_grad} == named


@each_method
def test_the_frozen_backbone_is_bit_identical_after_a_step(method: PeftMethod) -> None:
    case = toy(method)
    frozen = {
        n: p.clone() for n, p in case.model.named_parameters() if not p.requires_grad
    }
    engine = _engine(case.operations, case.model)
    engine.accumulate(toy_losses(case.model, 4))
    engine.step(lambda total, _: total)
    trainable = [p for p in case.model.parameters() if p.requires_grad]
    torch.optim.AdamW(trainable, lr=0.1).step()
    for name, parameter in case.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])


@each_method
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_per_sample_gradients_equal_the_one_example_loop(
    method: PeftMethod, batch: int, dropout: float
) -> None:
    case = toy(method, dropout)
    engine = _engine(case.operations, case.model)
    torch.manual_seed(5)  # the same masks for both
    rows = engine.per_sample_gradients(toy_losses(case.model, batch))
    torch.manual_seed(5)
    losses = toy_losses(case.plain, batch)
    expected = loop_gradients(losses, case.plain_parameters)
    assert relative_error(rows, expected) < 1e-5


@each_method
def test_gradients_survive_activation_checkpointing(method: PeftMethod) -> None:
    case = toy(method)
    case.model.train()
    case.model.backbone.activation_checkpointing_enable()
    rows = _engine(case.operations, case.model).per_sample_gradients(
        toy_losses(case.model, 3)
    )
    expected = loop_gradients(toy_losses(case.plain, 3), case.plain_parameters)
    assert relative_error(rows, expected) < 1e-5


@each_method
def test_gradients_are_close_under_bf16_autocast(method: PeftMethod) -> None:
    case = toy(method)
    engine = _engine(case.operations, case.model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = toy_losses(case.model, 3)
    rows = engine.per_sample_gradients(losses)
    assert rows.dtype == torch.float32
    expected = loop_gradients(toy_losses(case.plain, 3), case.plain_parameters)
    assert relative_error(rows, expected) < 0.05
