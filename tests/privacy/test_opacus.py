"""Opacus' rules behind our step, and our rules behind Opacus' own engine."""

import pytest
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleHooks
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedpeft.interfaces import Operation
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import METHODS
from fedpeft.privacy.engine import DpSgd
from fedpeft.privacy.opacus_hooks import OpacusHooks
from fedpeft.privacy.opacus_samplers import register_opacus_samplers
from tests.helpers import Toy, toy, toy_batch, toy_losses

_OF_OPACUS = [
    "ignore:Secure RNG turned off",
    "ignore:Full backward hook is firing",
]


@pytest.fixture(autouse=True)
def _own_register(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = dict(GradSampleHooks.GRAD_SAMPLERS)
    monkeypatch.setattr(GradSampleHooks, "GRAD_SAMPLERS", rules)


def _no_noise(total: torch.Tensor, deviation: float) -> torch.Tensor:
    return total.clone()


def _bound(model: nn.Module, operations: list[Operation], norm: float = 1e9) -> DpSgd:
    engine = DpSgd(norm, 0.0, 1, source=OpacusHooks())
    engine.bind(model, operations)
    return engine


def _loop(case: Toy, batch: int) -> torch.Tensor:
    return loop_gradients(toy_losses(case.plain, batch), case.plain_parameters)


def _gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    "method",
    ["lora", "ssf", "bias", "film", "bottleneck", "ia3", "prefix", "prompt", "head"],
)
def test_rows_equal_the_taps_and_the_loop(method: str, is_training: bool) -> None:
    tapped, case = toy(METHODS[method]()), toy(METHODS[method]())
    taps = DpSgd(1.0, 0.0, 1)
    taps.bind(tapped.model, tapped.operations)
    expected = _loop(case, 4)
    engine = _bound(case.model.train(is_training), case.operations)
    rows = engine.per_sample_gradients(toy_losses(case.model, 4))
    ours = taps.per_sample_gradients(toy_losses(tapped.model, 4))
    assert relative_error(rows, expected) < 1e-5
    assert relative_error(rows, ours) < 1e-5


class _Convolved(nn.Module):
    """A trainable convolution, which the taps have no rule for, before a head."""

    def __init__(self, **settings) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv1d(3, 4, 3, padding=1, **settings)
            self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.convolution(x)).mean(2))

    @property
    def operations(self) -> list[Operation]:
        kinds = ((self.convolution, "other"), (self.head, "linear"))
        return [Operation(m, kind, dict(m.named_parameters())) for m, kind in kinds]

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(len(x), dtype=torch.long)
        return F.cross_entropy(self(x), labels, reduction="none")


def test_a_layer_unknown_to_the_taps_trains_by_opacus(rng) -> None:
    x = torch.randn(5, 3, 6, generator=rng)
    plain, model = _Convolved(), _Convolved()
    with pytest.raises(ValueError, match=r"other \(Conv1d\).* engine = 'opacus'"):
        DpSgd(1.0, 0.0, 1).bind(model, model.operations)
    engine = _bound(model, model.operations, norm=0.1)
    for part in (x[:2], x[2:]):
        engine.accumulate(model.losses(part))
    engine.step(_no_noise)
    rows = loop_gradients(plain.losses(x), list(plain.parameters()))
    assert (rows.norm(dim=1) > 0.1).all()
    expected = F.normalize(rows).sum(0) * 0.1
    # 1e-5 below the norm by design
    assert relative_error(_gradient(model), expected) < 2e-5


def test_a_rule_that_overlooks_a_setting_is_refused(rng) -> None:
    model = _Convolved(padding_mode="circular")  # Opacus pads with zeros
    engine = _bound(model, model.operations)
    with pytest.raises(ValueError, match=r"another gradient for Conv1d.*circular"):
        engine.accumulate(model.losses(torch.randn(2, 3, 6, generator=rng)))


def test_a_layer_without_a_rule_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    operations = [
        Operation(model[0], "linear", dict(model[0].named_parameters())),
        Operation(model[1], "other", dict(model[1].named_parameters())),
    ]
    with pytest.raises(ValueError, match=r"got 1 \(PReLU\).*register_grad_sampler"):
        _bound(model, operations)


class _Prompted(nn.Module):
    """Evaluates its prompt once for the whole batch, as peft's prompt tuning does."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Embedding(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        prompt = self.prompt(torch.arange(2).unsqueeze(0))
        return torch.cat([prompt.expand(len(x), -1, -1), x], 1).tanh().sum((1, 2))


def test_a_layer_evaluated_once_for_the_whole_batch_is_refused() -> None:
    model = _Prompted()
    operation = Operation(model.prompt, "other", {"weight": model.prompt.weight})
    engine = _bound(model, [operation])
    with pytest.raises(ValueError, match=r"\(3, 2, 4\), got \(1, 2, 4\).*mixes"):
        engine.accumulate(model(torch.randn(3, 5, 4)))


@pytest.mark.parametrize("split", [(4,), (1, 3), (1, 1, 1, 1)])
def test_physical_batches_of_every_size_make_the_same_step(split) -> None:
    case = toy(METHODS["ssf"]())
    engine = _bound(case.model, case.operations)
    start = 0
    for size in split:
        part = slice(start, start + size)
        engine.accumulate(toy_losses(case.model, 4, part))
        start += size
    engine.step(_no_noise)
    assert relative_error(_gradient(case.model), _loop(case, 4).sum(0)) < 1e-5


def test_an_empty_batch_is_a_step_of_noise_alone() -> None:
    case = toy(METHODS["bias"]())
    engine = _bound(case.model, case.operations)
    engine.step(lambda total, deviation: total + 3.0)
    assert torch.equal(_gradient(case.model), torch.full_like(_gradient(case.model), 3))


def test_an_interrupted_step_leaves_nothing_behind() -> None:
    case = toy(METHODS["lora"]())
    engine = _bound(case.model, case.operations)
    engine.accumulate(toy_losses(case.model, 2))
    toy_losses(case.model, 3)  # a forward pass without its backward pass
    engine.reset()
    rows = engine.per_sample_gradients(toy_losses(case.model, 4))
    assert relative_error(rows, _loop(case, 4)) < 1e-5


def test_the_model_can_be_bound_again_and_keeps_its_names() -> None:
    case = toy(METHODS["ssf"]())
    names = list(case.model.state_dict())
    for _ in range(2):
        engine = _bound(case.model, case.operations)
        rows = engine.per_sample_gradients(toy_losses(case.model, 4))
        assert relative_error(rows, _loop(case, 4)) < 1e-5
    assert list(case.model.state_dict()) == names
    assert all(p.grad is None for p in case.model.parameters())
    assert all(not hasattr(p, "grad_sample") for p in case.model.parameters())


def test_a_checkpointed_layer_counts_once(rng) -> None:
    x = torch.randn(3, 3, 6, generator=rng)
    plain, model = _Convolved(), _Convolved()
    engine = _bound(model, model.operations)
    logits = checkpoint(model, x, use_reentrant=False)
    losses = F.cross_entropy(logits, torch.zeros(3).long(), reduction="none")
    expected = loop_gradients(plain.losses(x), list(plain.parameters()))
    assert relative_error(engine.per_sample_gradients(losses), expected) < 1e-5


def test_rows_of_a_half_precision_forward_are_sums_in_single(rng) -> None:
    x = torch.randn(3, 3, 6, generator=rng)
    plain, model = _Convolved(), _Convolved()
    engine = _bound(model, model.operations)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(x)
    rows = engine.per_sample_gradients(losses)
    assert rows.dtype == torch.float32
    expected = loop_gradients(plain.losses(x), list(plain.parameters()))
    assert relative_error(rows, expected) < 0.05


def _under_opacus(model: nn.Module, *data: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Takes one step of Opacus' own engine without noise and clipping.

    Returns the per-sample gradients and the gradient of the step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, optimizer, loader = PrivacyEngine().make_private(
        module=model.train(),
        optimizer=torch.optim.SGD(trained, lr=1.0),
        data_loader=DataLoader(TensorDataset(*data), batch_size=len(data[0])),
        noise_multiplier=0.0,
        max_grad_norm=1e9,
        poisson_sampling=False,
    )
    ((*inputs, labels),) = loader
    F.cross_entropy(wrapped(*inputs), labels).backward()
    rows = torch.cat([p.grad_sample.flatten(1) for p in trained], 1)
    optimizer.step()
    return rows, _gradient(model)


@pytest.mark.filterwarnings(*_OF_OPACUS)
@pytest.mark.parametrize("method", ["ssf", "ia3", "bottleneck", "film", "lora"])
def test_opacus_own_engine_trains_our_methods_like_the_loop(method: str) -> None:
    case = toy(METHODS[method]())
    register_opacus_samplers(case.operations)
    expected = _loop(case, 4)
    rows, gradient = _under_opacus(case.model, *toy_batch(4))
    assert relative_error(rows, expected) < 1e-5
    assert relative_error(gradient, expected.mean(0)) < 1e-5


@pytest.mark.filterwarnings(*_OF_OPACUS)
@pytest.mark.parametrize("norm", [nn.LayerNorm(4, bias=False), LlamaRMSNorm(4)])
def test_opacus_own_engine_trains_norms_that_it_cannot(norm: nn.Module, rng) -> None:
    model = nn.Sequential(norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    x, labels = torch.randn(5, 3, 4, generator=rng), torch.tensor([0, 1, 1, 0, 1])
    losses = F.cross_entropy(model(x), labels, reduction="none")
    expected = loop_gradients(losses, list(model.parameters()))
    register_opacus_samplers([Operation(norm, "norm", {"weight": norm.weight})])
    rows, _ = _under_opacus(model, x, labels)
    assert relative_error(rows, expected) < 1e-5


def test_tokens_that_see_no_example_are_refused_for_opacus() -> None:
    with pytest.raises(ValueError, match="of kind tokens"):
        register_opacus_samplers(toy(METHODS["prompt"]()).operations)
