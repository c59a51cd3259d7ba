import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import SSF, Bias, Lora, ScaleShift
from fedpeft.privacy import DpSgd, NonPrivate
from fedpeft.privacy.rows import clipped_sum
from tests.helpers import Toy, toy, toy_losses


def _no_noise(total: torch.Tensor, deviation: float) -> torch.Tensor:
    return total.clone()


def _bound(case: Toy, clipping_norm: float, nominal_batch: int = 1) -> DpSgd:
    engine = DpSgd(clipping_norm, 0.0, nominal_batch)
    engine.bind(case.model, case.operations)
    return engine


def _gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_clipped_mean_equals_the_one_example_loop() -> None:
    case = toy(Lora(rank=2))
    engine = _bound(case, clipping_norm=0.5, nominal_batch=4)
    engine.accumulate(toy_losses(case.model, 4))
    engine.step(_no_noise)
    rows = loop_gradients(toy_losses(case.plain, 4), case.plain_parameters)
    factors = (0.5 / rows.norm(dim=1)).clamp(max=1)
    assert (rows.norm(dim=1) > 0.5).any()
    expected = (rows * factors[:, None]).sum(0) / 4
    # 1e-5 below the norm by design, see clipped_sum
    assert relative_error(_gradient(case.model), expected) < 2e-5


@pytest.mark.parametrize("split", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_physical_batches_of_every_size_make_the_same_step(split) -> None:
    whole = toy(SSF())
    engine = _bound(whole, clipping_norm=1.0)
    engine.accumulate(toy_losses(whole.model, 5))
    engine.step(_no_noise)
    parts = toy(SSF())
    engine = _bound(parts, clipping_norm=1.0)
    start = 0
    for size in split:
        part = slice(start, start + size)
        engine.accumulate(toy_losses(parts.model, 5, part))
        start += size
    engine.step(_no_noise)
    error = relative_error(_gradient(parts.model), _gradient(whole.model))
    assert error < 1e-5


def test_an_empty_batch_is_a_step_of_noise_alone() -> None:
    case = toy(Bias())
    engine = _bound(case, clipping_norm=2.0, nominal_batch=4)
    engine.step(lambda total, deviation: total + 8.0)
    assert torch.equal(_gradient(case.model), torch.full_like(_gradient(case.model), 2))


def test_the_sum_does_not_outlive_its_step() -> None:
    case = toy(Bias())
    engine = _bound(case, clipping_norm=1.0)
    engine.accumulate(toy_losses(case.model, 3))
    engine.step(_no_noise)
    engine.step(_no_noise)
    assert not _gradient(case.model).any()


def test_noise_has_the_planned_standard_deviation() -> None:
    case = toy(Bias())
    engine = DpSgd(clipping_norm=0.5, noise_multiplier=3.0, nominal_batch=1)
    engine.bind(case.model, case.operations)
    asked = []
    engine.step(lambda total, deviation: asked.append(deviation) or total)
    assert asked == [1.5]


class _Scorer(nn.Module):
    """A model whose inputs can be anything, NaN included."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.film = ScaleShift(4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.film(self.frozen(x))).mean(1))

    @property
    def operations(self) -> list[Operation]:
        head = {"weight": self.head.weight, "bias": self.head.bias}
        return [
            self.film.operation,
            Operation(self.head, "linear", head),
        ]


def _released_sum(x: torch.Tensor, clipping_norm: float) -> torch.Tensor:
    model = _Scorer()
    engine = DpSgd(clipping_norm, 0.0, 1)
    engine.bind(model, model.operations)
    labels = torch.zeros(len(x), dtype=torch.long)
    engine.accumulate(F.cross_entropy(model(x), labels, reduction="none"))
    sums = []
    engine.step(lambda total, _: sums.append(total.clone()) or total)
    return sums[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 1.0])
@pytest.mark.parametrize("clipping_norm", [1e-3, 0.1, 10.0])
def test_one_more_example_moves_the_sum_by_at_most_the_norm(bad, clipping_norm) -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    neighbour = torch.cat([x, torch.full((1, 5, 4), bad)])
    before = _released_sum(x, clipping_norm)
    after = _released_sum(neighbour, clipping_norm)
    assert after.isfinite().all()
    # 1 + 1e-6: the two sums are themselves rounded to single precision
    assert (after - before).double().norm() <= clipping_norm * (1 + 1e-6)


@given(
    st.integers(1, 6),
    st.integers(1, 300),
    st.floats(1e-6, 1e6),
    st.floats(1e-3, 1e3),
)
def test_every_row_is_bounded_rounding_included(batch, size, scale, bound) -> None:
    rng = torch.Generator().manual_seed(batch * size)
    for row in torch.randn(batch, size, generator=rng) * scale:
        part = clipped_sum(row[None].clone(), bound * (1 - 1e-5))
        assert part.double().norm() <= bound


def test_a_row_that_is_not_finite_becomes_zero_alone() -> None:
    rows = torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [1e38, 1e38]])
    assert torch.allclose(clipped_sum(rows, 5.0), torch.tensor([3.0, 4.0]), rtol=1e-4)


def test_an_uncovered_parameter_is_refused_at_once() -> None:
    case = toy(Lora(rank=2))
    with pytest.raises(ValueError, match=r"exactly one operation, .*lora_A.* is in 0"):
        DpSgd(1.0, 1.0, 1).bind(case.model, case.operations[1:])
    with pytest.raises(ValueError, match="is in 2"):
        DpSgd(1.0, 1.0, 1).bind(case.model, [*case.operations, case.operations[0]])


def test_a_parameter_without_a_gradient_is_refused_at_the_step() -> None:
    model = _Scorer()
    engine = DpSgd(1.0, 0.0, 1)
    engine.bind(model, model.operations)
    with pytest.raises(ValueError, match="2 received none"):
        engine.accumulate(model.head(torch.randn(3, 4)).sum(1))


def test_an_operation_that_mixes_examples_is_refused() -> None:
    model = _Scorer()
    engine = DpSgd(1.0, 0.0, 1)
    engine.bind(model, model.operations)
    shared = model(torch.randn(1, 5, 4)).expand(3, 2)  # one row stands for three
    with pytest.raises(ValueError, match="mixes examples"):
        engine.accumulate(shared.sum(1))


def test_a_module_used_twice_adds_up() -> None:
    head = nn.Linear(4, 4)
    plain = copy.deepcopy(head)
    parameters = {"weight": head.weight, "bias": head.bias}
    engine = DpSgd(1.0, 0.0, 1)
    engine.bind(head, [Operation(head, "linear", parameters)])
    x = torch.randn(3, 4)
    rows = engine.per_sample_gradients(head(torch.tanh(head(x))).sum(1))
    losses = plain(torch.tanh(plain(x))).sum(1)
    assert relative_error(rows, loop_gradients(losses, list(plain.parameters()))) < 1e-5


def test_without_privacy_it_is_plain_training() -> None:
    private, plain = toy(Lora(rank=2)), toy(Lora(rank=2))
    engine = _bound(private, clipping_norm=float("inf"), nominal_batch=4)
    other = NonPrivate()
    other.bind(plain.model, plain.operations)
    for case, each in ((private, engine), (plain, other)):
        each.accumulate(toy_losses(case.model, 4, slice(1)))
        each.accumulate(toy_losses(case.model, 4, slice(1, None)))
        each.step(_no_noise)
    toy_losses(plain.plain, 4).mean().backward()
    expected = _gradient(plain.plain)
    assert relative_error(_gradient(private.model), expected) < 1e-5
    assert relative_error(_gradient(plain.model), expected) < 1e-5


def test_batch_normalisation_is_refused() -> None:
    head = nn.Linear(4, 2)
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), head)
    operation = Operation(head, "linear", dict(head.named_parameters()))
    with pytest.raises(ValueError, match="batch normalisation"):
        DpSgd(1.0, 1.0, 1).bind(model, [operation])


def test_zeroing_a_row_touches_neither_the_others_nor_the_input() -> None:
    head = nn.Linear(3, 2)
    engine = DpSgd(1e9, 0.0, 1)
    engine.bind(head, [Operation(head, "linear", dict(head.named_parameters()))])
    x = torch.tensor([[1.0, 2, 3], [float("nan"), 1, 1], [4, 5, 6]], requires_grad=True)
    before = x.detach().clone()
    engine.accumulate(head(x).sum(1))  # whose gradient is one number, expanded
    engine.step(_no_noise)
    assert torch.equal(head.weight.grad, torch.tensor([[5.0, 7, 9], [5, 7, 9]]))
    assert torch.equal(x.detach().nan_to_num(), before.nan_to_num())


def test_a_parameter_that_something_else_uses_is_refused() -> None:
    head = nn.Linear(3, 3)
    engine = DpSgd(1.0, 0.0, 1)
    engine.bind(head, [Operation(head, "linear", dict(head.named_parameters()))])
    tied = head(torch.randn(2, 3)) @ head.weight
    with pytest.raises(ValueError, match="a tied weight"):
        engine.accumulate(tied.sum(1))
