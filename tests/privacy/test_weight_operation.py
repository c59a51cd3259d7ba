"""Weights that are functions of trainable values, against the one-example loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedpeft.interfaces import Operation
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft.mask import Masked
from fedpeft.peft.nola import Combination
from fedpeft.peft.onebit import Quantised
from fedpeft.privacy import DpSgd
from tests.helpers import assert_rows_close


class Curved(nn.Module):
    """A weight that is not linear in its two parameters: tanh(u v^T)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(outputs, 1))
        self.v = nn.Parameter(torch.randn(inputs))
        self.register_buffer("bias", torch.randn(outputs))

    def weight_from(self, parameters):
        return torch.tanh(parameters["u"] * parameters["v"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_from(dict(self.named_parameters()))
        return F.linear(x, weight, self.bias)


def _combination(inputs: int, outputs: int) -> Combination:
    return Combination(inputs, outputs, num_bases=3, start=0.5, bound=1.0)


def _masked(inputs: int, outputs: int, density: float) -> Masked:
    base = nn.Linear(inputs, outputs).requires_grad_(False)
    size = inputs * outputs
    module = Masked(base, torch.arange(0, size, max(1, round(1 / density))))
    nn.init.normal_(module.values)
    return module


MAKERS = {
    "curved": Curved,
    "combination": _combination,
    "quantised": lambda inputs, outputs: Quantised(torch.randn(outputs, inputs), 1),
    "two-bits": lambda inputs, outputs: Quantised(torch.randn(outputs, inputs), 2),
    "mask": lambda inputs, outputs: _masked(inputs, outputs, 0.5),
    "every-entry": lambda inputs, outputs: _masked(inputs, outputs, 1.0),
}
each_module = pytest.mark.parametrize("name", MAKERS)
sizes = st.integers(1, 6)


@pytest.fixture(autouse=True)
def _own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _bound(module: nn.Module) -> DpSgd:
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    engine = DpSgd(1.0, 0.0, 1)
    engine.bind(module, [Operation(module, "weight", parameters)])
    return engine


def _losses(output: torch.Tensor) -> torch.Tensor:
    return torch.tanh(output.float()).flatten(1).cumsum(1).square().sum(1)


def _compare(module: nn.Module, output) -> None:
    plain = copy.deepcopy(module)
    rows = _bound(module).per_sample_gradients(_losses(output(module)))
    parameters = [p for p in plain.parameters() if p.requires_grad]
    expected = loop_gradients(_losses(output(plain)), parameters)
    assert_rows_close(rows, expected, parameters)


@each_module
@pytest.mark.parametrize("input_trains", [True, False])
@given(
    batch=sizes,
    middle=st.lists(st.integers(1, 5), max_size=2),
    inputs=sizes,
    outputs=sizes,
    seed=sizes,
)
def test_rows_equal_the_loop(
    name: str, input_trains: bool, batch: int, middle, inputs, outputs, seed
) -> None:
    torch.manual_seed(seed)
    module = MAKERS[name](inputs, outputs)
    x = torch.randn(batch, *middle, inputs, requires_grad=input_trains)
    _compare(module, lambda model: model(x))


@pytest.mark.parametrize("density", [0.004, 0.3])
def test_both_ways_of_a_mask_equal_the_loop(density: float) -> None:
    module, x, g = _masked(30, 40, density), torch.randn(5, 30), torch.randn(5, 40)
    assert (module._few(g, x) - module._many(g, x)).abs().max() < 1e-5
    _compare(module, lambda model: model(x.expand(3, 5, 30)))


@each_module
def test_a_module_used_twice_has_the_sum_of_both(name: str) -> None:
    module, x = MAKERS[name](4, 4), torch.randn(3, 2, 4)
    _compare(module, lambda model: model(torch.tanh(model(x))))


@each_module
def test_rows_survive_checkpointing(name: str) -> None:
    module, x = MAKERS[name](4, 5), torch.randn(3, 2, 4, requires_grad=True)
    _compare(module, lambda model: checkpoint(model, x, use_reentrant=False))


@each_module
def test_rows_are_close_under_bf16_autocast(name: str) -> None:
    module, x = MAKERS[name](16, 5), torch.randn(3, 4, 16)
    plain = copy.deepcopy(module)
    engine = _bound(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = _losses(module(x))
    rows = engine.per_sample_gradients(losses)
    assert rows.dtype == torch.float32
    parameters = [p for p in plain.parameters() if p.requires_grad]
    expected = loop_gradients(_losses(plain(x)), parameters)
    assert relative_error(rows, expected) < 0.05


@each_module
def test_parameters_enter_the_forward_pass_detached(name: str) -> None:
    module = MAKERS[name](4, 5)
    _bound(module)
    weight = module.weight_from
    seen = []

    def note(parameters):
        seen.extend(parameters.values())
        return weight(parameters)

    module.weight_from = note
    module(torch.randn(3, 4))
    assert seen
    assert not any(parameter.requires_grad for parameter in seen)


def test_a_module_that_does_not_tell_its_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_from and bias, got Linear"):
        _bound(nn.Linear(3, 2))
