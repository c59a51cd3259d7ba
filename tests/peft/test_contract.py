"""What every method of the menu keeps, on every family of backbones."""

from collections.abc import Iterator

import pytest
import torch

from fedpeft.interfaces import PeftMethod
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import (
    IA3,
    METHODS,
    SSF,
    AdaLora,
    Bias,
    Bottleneck,
    FedSB,
    Film,
    Full,
    LoKr,
    Lora,
    Mask,
    Nola,
    OneBit,
    Prefix,
    Prompt,
    RandLora,
    Shira,
    Side,
    SSFPool,
    Vera,
)
from fedpeft.privacy import DpSgd
from tests.helpers import (
    FAMILIES,
    Toy,
    assert_rows_close,
    toy,
    toy_inputs,
    toy_losses,
)

EVERY_LINEAR = ("dense", "q_proj", "k_proj", "fc1", "fc2", "gate_proj", "down_proj")
REQUIRED = {"token_rows": {"token_ids": (5, 0, 63, 17)}}
UNMERGED = {("llama", SSF)}  # no RMSNorm has a bias that could take the shift
CASES: dict[str, PeftMethod] = {
    **{name: METHODS[name](**REQUIRED.get(name, {})) for name in METHODS},
    "bias-top": Bias(first_layer=1),
    "film-top": Film(first_layer=1),
    "ssf-top": SSF(first_layer=1),
    "ssf_pool-top": SSFPool(pool_size=5, top_k=3, first_layer=1),
    "ssf_pool-pooled-head": SSFPool(pool_size=4, head="pooled"),
    "ssf_pool-counts": SSFPool(pool_size=4, counts=True),
    "ssf_pool-of-one": SSFPool(pool_size=1, top_k=1),
    "full-top": Full(first_layer=1),
    "prompt-deep": Prompt(length=3, deep=True),
    "ia3-top": IA3(first_layer=1),
    "lora-frozen-a": Lora(rank=2, freeze_a=True),
    "lora-rank-stabilized": Lora(rank=4, rank_stabilized=True),
    "lora-every-linear": Lora(rank=2, target_modules=EVERY_LINEAR),
    "lora-top": Lora(rank=2, first_layer=1),
    "lora-pissa": Lora(rank=4, init="pissa"),
    "lora-dora": Lora(rank=2, dora=True),
    "lora-dora-pissa-frozen-a": Lora(rank=2, dora=True, init="pissa", freeze_a=True),
    "adalora-top": AdaLora(initial_rank=3, target_rank=2, first_layer=1),
    "vera-every-linear": Vera(rank=5, target_modules=EVERY_LINEAR),
    "randlora-every-linear": RandLora(8, 8.0, target_modules=EVERY_LINEAR),
    "lokr-low-rank": LoKr(rank=2, factor=2),
    "shira-every-linear": Shira(density=0.1, target_modules=EVERY_LINEAR),
    "nola-frozen-alpha": Nola(rank=2, num_bases=3, freeze_alpha=True),
    "nola-every-linear": Nola(rank=2, num_bases=3, target_modules=EVERY_LINEAR),
    "onebit-two-bits": OneBit(rank=2, bits=2, target_modules=EVERY_LINEAR),
    "fedsb-svd": FedSB(rank=3, init="svd", target_modules=EVERY_LINEAR),
    "mask-dense": Mask(density=0.1, first_layer=1),
    "bottleneck-both": Bottleneck(width=3, placement="both"),
    "bottleneck-top": Bottleneck(width=3, first_layer=1),
    "side-top": Side(reduction=4, first_layer=1),
    "prefix-top": Prefix(length=3, first_layer=1),
}


def _pairs() -> Iterator[object]:
    for family in FAMILIES:
        for name, method in CASES.items():
            if not (family == "vit" and name == "token_rows"):  # images have no tokens
                yield pytest.param(family, method, id=f"{family}-{name}")


each_method = pytest.mark.parametrize(("family", "method"), list(_pairs()))


def _engine(case: Toy) -> DpSgd:
    engine = DpSgd(clipping_norm=1.0, noise_multiplier=0.0, nominal_batch=1)
    engine.bind(case.model, case.operations)
    return engine


@each_method
def test_backbone_output_at_initialisation(family: str, method: PeftMethod) -> None:
    inputs = toy_inputs(family, 4)
    expected = FAMILIES[family]()(**inputs).last_hidden_state
    backbone = FAMILIES[family]()
    method.attach(backbone)
    actual = backbone(**inputs).last_hidden_state
    assert actual.shape == expected.shape
    if getattr(method, "init", None) == "pissa":  # a sum in another order
        assert relative_error(actual.detach(), expected) < 1e-5
    else:
        assert torch.equal(actual, expected) == method.is_identity_at_start


@each_method
def test_exactly_the_operations_parameters_train(
    family: str, method: PeftMethod
) -> None:
    backbone = FAMILIES[family]().requires_grad_(True)
    operations = method.attach(backbone)
    named = [id(p) for op in operations for p in op.parameters.values()]
    assert len(named) == len(set(named))
    assert {id(p) for p in backbone.parameters() if p.requires_grad} == set(named)


@each_method
def test_a_trainable_state_comes_back_whole(family: str, method: PeftMethod) -> None:
    source, target = toy(method, family=family), toy(method, noise=0.2, family=family)
    state = {n: p for n, p in source.model.named_parameters() if p.requires_grad}
    target.model.load_state_dict(state, strict=False)
    inputs = toy_inputs(family, 3).values()
    assert torch.equal(target.model(*inputs), source.model(*inputs))


@each_method
def test_the_frozen_backbone_is_bit_identical_after_a_step(
    family: str, method: PeftMethod
) -> None:
    case = toy(method, family=family)
    frozen = {
        n: p.clone() for n, p in case.model.named_parameters() if not p.requires_grad
    }
    engine = _engine(case)
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
    family: str, method: PeftMethod, batch: int, dropout: float
) -> None:
    case = toy(method, dropout, family=family)
    engine = _engine(case)
    torch.manual_seed(5)  # the same masks for both
    rows = engine.per_sample_gradients(toy_losses(case.model, batch))
    torch.manual_seed(5)
    losses = toy_losses(case.plain, batch)
    expected = loop_gradients(losses, case.plain_parameters)
    assert_rows_close(rows, expected, case.plain_parameters)


@each_method
def test_an_example_is_alone_in_its_batch(family: str, method: PeftMethod) -> None:
    case = toy(method, family=family)
    part = toy_losses(case.model, 5, slice(2, 4))
    assert (toy_losses(case.model, 5)[2:4] - part).abs().max() < 1e-5


@each_method
def test_an_empty_batch_is_a_step_of_noise_alone(
    family: str, method: PeftMethod
) -> None:
    case = toy(method, family=family)
    engine = _engine(case)
    engine.step(lambda total, _: total + 2.0)
    trainable = [p for p in case.model.parameters() if p.requires_grad]
    assert all((p.grad == 2.0).all() for p in trainable)


@each_method
def test_gradients_survive_activation_checkpointing(
    family: str, method: PeftMethod
) -> None:
    case = toy(method, family=family)
    case.model.train()
    case.model.backbone.activation_checkpointing_enable()
    rows = _engine(case).per_sample_gradients(toy_losses(case.model, 3))
    expected = loop_gradients(toy_losses(case.plain, 3), case.plain_parameters)
    assert_rows_close(rows, expected, case.plain_parameters)


@each_method
def test_gradients_are_close_under_bf16_autocast(
    family: str, method: PeftMethod
) -> None:
    case = toy(method, family=family)
    engine = _engine(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = toy_losses(case.model, 3)
    rows = engine.per_sample_gradients(losses)
    assert rows.dtype == torch.float32
    expected = loop_gradients(toy_losses(case.plain, 3), case.plain_parameters)
    assert relative_error(rows, expected) < 0.05


@each_method
def test_a_method_trains_under_noise(family: str, method: PeftMethod) -> None:
    case = toy(method, family=family)
    engine = DpSgd(clipping_norm=1.0, noise_multiplier=0.5, nominal_batch=4)
    engine.bind(case.model, case.operations)
    trainable = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    rng = torch.Generator().manual_seed(3)
    for _ in range(3):
        engine.accumulate(toy_losses(case.model, 4))
        engine.step(
            lambda total, s: total + s * torch.randn(total.shape, generator=rng)
        )
        optimizer.step()
    for name, parameter in trainable.items():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name


@each_method
def test_a_method_merges_exactly_or_refuses(family: str, method: PeftMethod) -> None:
    backbone = toy(method, family=family).plain.backbone.eval()
    inputs, names = toy_inputs(family, 4), _module_names(backbone)
    with torch.no_grad():
        expected = backbone(**inputs).last_hidden_state
        if type(method).merge is PeftMethod.merge or (family, type(method)) in UNMERGED:
            with pytest.raises(ValueError, match="Expected"):
                method.merge(backbone)
            assert _module_names(backbone) == names
            assert torch.equal(backbone(**inputs).last_hidden_state, expected)
        else:
            method.merge(backbone)
            assert _module_names(backbone) == _module_names(FAMILIES[family]())
            merged = backbone(**inputs).last_hidden_state
            assert relative_error(merged, expected) < 1e-5


def _module_names(backbone: torch.nn.Module) -> list[str]:
    return [name for name, _ in backbone.named_modules()]
