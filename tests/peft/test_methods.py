"""Parameter counts by closed formula on a BERT of 2 layers, 32 features, 64 inside."""

import pytest
from torch import nn

from fedpeft.peft import SSF, Bias, Head, Lora
from tests.helpers import tiny_bert

ONE_LAYER_LINEAR = 4 * 32 + 64 + 32  # query, key, value, output; up; down
ONE_LAYER_NORMS = 2 * 32


def _trainable(backbone: nn.Module) -> int:
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Head(), 0),
        (Bias(), 2 * (ONE_LAYER_LINEAR + ONE_LAYER_NORMS) + 32),
        (Bias(first_layer=1), ONE_LAYER_LINEAR + ONE_LAYER_NORMS),
        (SSF(), 2 * (2 * (ONE_LAYER_LINEAR + ONE_LAYER_NORMS) + 32)),
        (Lora(rank=4), 2 * 2 * 4 * (32 + 32)),
        (Lora(rank=4, freeze_a=True), 2 * 2 * 4 * 32),
        (Lora(rank=4, first_layer=1), 2 * 4 * (32 + 32)),
    ],
)
def test_number_of_trainable_parameters(method, count) -> None:
    backbone = tiny_bert()
    method.attach(backbone)
    assert _trainable(backbone) == count


def test_lora_adds_the_scaled_product() -> None:
    backbone = tiny_bert()
    up, *_ = Lora(rank=2, lora_alpha=6, freeze_a=True).attach(backbone)
    query = backbone.encoder.layer[0].attention.self.query
    nn.init.ones_(up.module.weight)
    x = nn.init.ones_(nn.Parameter(query.base_layer.weight.new_empty(1, 32)))
    down = query.lora_A["default"].weight
    expected = query.base_layer(x) + 3.0 * down.sum()
    assert (query(x) - expected).abs().max() < 1e-5


def test_ssf_scales_then_shifts() -> None:
    backbone = tiny_bert()
    first, *_ = SSF(first_layer=1).attach(backbone)
    nn.init.constant_(first.parameters["scale"], 2.0)
    nn.init.constant_(first.parameters["shift"], 3.0)
    x = first.module.base.weight.new_ones(1, 32)
    expected = 2 * first.module.base(x) + 3
    assert (first.module(x) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("make", [lambda: Lora(rank=0), lambda: SSF(first_layer=-1)])
def test_impossible_hyperparameters_are_refused(make) -> None:
    with pytest.raises(ValueError, match="Expected"):
        make()


@pytest.mark.parametrize("method", [Lora(first_layer=2), SSF(first_layer=2)])
def test_a_layer_beyond_the_last_is_refused(method) -> None:
    with pytest.raises(ValueError, match="first_layer <= 1"):
        method.attach(tiny_bert())


def test_lora_takes_linear_layers_only() -> None:
    with pytest.raises(ValueError, match="linear layers, got Embedding"):
        Lora(target_modules=("word_embeddings",)).attach(tiny_bert())
