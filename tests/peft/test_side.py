"""Ladder side-tuning: sizes, and a backbone through which no gradient passes."""

import copy

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from fedpeft.passes import stack_of
from fedpeft.peft import Side
from fedpeft.peft.side import Rung, SideNetwork
from tests.helpers import FAMILIES, tiny_bert, toy, toy_inputs, toy_losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("reduction", "first_layer"), [(8, 0), (4, 0), (4, 1)])
def test_sizes_follow_the_formula(
    family: str, reduction: int, first_layer: int
) -> None:
    operations = Side(reduction, first_layer).attach(FAMILIES[family]())
    width, rungs = 32 // reduction, 2 - first_layer
    block = 2 * width + 2 * width * (width + 1) + width * (2 * width + 1)
    top = 2 * width + 32 * (width + 1)
    expected = rungs * block + (rungs - 1) * width + top
    assert sum(p.numel() for op in operations for p in op.parameters.values()) == (
        expected
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_passes_through_the_backbone(family: str) -> None:
    model = toy(Side(), family=family).plain
    outputs: list[torch.Tensor] = []
    for module in stack_of(model.backbone):
        module.register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
    losses = toy_losses(model, 3)
    assert losses.requires_grad
    assert len(outputs) == 2
    assert not any(output.requires_grad for output in outputs)


def test_what_the_side_reads_is_not_what_the_next_layer_reads() -> None:
    backbone, inputs = tiny_bert(), toy_inputs("bert", 3)
    expected = backbone(**inputs, output_hidden_states=True).hidden_states
    Side(reduction=4).attach(backbone)
    side = backbone.get_submodule("side")
    assert isinstance(side, SideNetwork)
    kept = side.compute(backbone, inputs)
    assert kept.shape == (3, 7, 2 * 8 + 32)
    assert torch.equal(kept[..., 16:], expected[-1])
    rungs = [m for m in backbone.modules() if isinstance(m, Rung)]
    for place, rung in enumerate(rungs):
        step = expected[place + 1] @ rung.weight.t()
        step = torch.nn.functional.layer_norm(step, (8,))
        assert torch.allclose(kept[..., 8 * place : 8 * place + 8], step, atol=1e-5)


def test_projections_are_orthonormal_and_frozen() -> None:
    backbone = tiny_bert()
    Side(reduction=4).attach(backbone)
    for module in backbone.modules():
        if isinstance(module, Rung):
            assert torch.allclose(
                module.weight @ module.weight.t(), torch.eye(8), atol=1e-6
            )
            assert not module.weight.requires_grad


def test_a_copy_climbs_its_own_ladder() -> None:
    model = toy(Side()).plain
    twin, inputs = copy.deepcopy(model), toy_inputs("bert", 3)
    expected = twin.backbone(**inputs).last_hidden_state
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin.backbone(**inputs).last_hidden_state, expected)


def test_a_dinov2_takes_a_side_too() -> None:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28
    )
    backbone, pixels = Dinov2Model(config), torch.randn(2, 3, 28, 28)
    expected = backbone(pixels).last_hidden_state
    Side().attach(backbone)
    assert torch.equal(backbone(pixels).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "reduction >= 1, got 0"),
        ({"reduction": 17}, "reduction <= 16, which leaves the side 2 of 32"),
        ({"first_layer": 2}, "first_layer <= 1, the deepest layer, got 2"),
    ],
)
def test_a_side_that_cannot_be_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Side(**options).attach(tiny_bert())
