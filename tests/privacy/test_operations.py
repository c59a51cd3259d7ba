"""Each kind of operation against the one-example loop, over shapes and masks."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedpeft.interfaces import Operation
from fedpeft.oracle import loop_gradients, relative_error
from fedpeft.peft import ScaleShift
from fedpeft.peft._tokens import VirtualTokens
from fedpeft.privacy import DpSgd
from tests.helpers import assert_rows_close

MAKERS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "linear": ("linear", lambda size: nn.Linear(size, 3)),
    "linear-no-bias": ("linear", lambda size: nn.Linear(size, 3, bias=False)),
    "scale-shift": ("scale_shift", ScaleShift),
    "scale": ("scale_shift", lambda size: ScaleShift(size, shift=False)),
    "bias-linear": ("bias", lambda size: nn.Linear(size, 3)),
    "bias-layer-norm": ("bias", nn.LayerNorm),
    "layer-norm": ("norm", nn.LayerNorm),
    "layer-norm-no-bias": ("norm", lambda size: nn.LayerNorm(size, bias=False)),
    "rms-norm": ("norm", nn.RMSNorm),
    "rms-norm-of-llama": ("norm", LlamaRMSNorm),
    "module": ("module", lambda size: nn.Sequential(nn.Linear(size, 3), nn.Tanh())),
    "module-bilinear": ("module", lambda size: _Bilinear(size)),
}


class _Bilinear(nn.Module):
    """Adds ``B A x`` to a frozen layer, with a constant that takes no part."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(size, 3).requires_grad_(False)
        self.down = nn.Parameter(torch.empty(2, size))
        self.up = nn.Parameter(torch.empty(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (self.up @ self.down).detach().norm()
        return self.frozen(x) + x @ (self.up @ self.down).t() / scale


def _make(name: str, size: int) -> tuple[nn.Module, Operation]:
    kind, maker = MAKERS[name]
    module = maker(size)
    if kind == "bias":
        module.requires_grad_(False).bias.requires_grad_(True)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        nn.init.normal_(parameter)
    return module, Operation(module, kind, parameters)  # type: ignore[arg-type]


def _bound(model: nn.Module, operation: Operation) -> DpSgd:
    engine = DpSgd(1.0, 0.0, 1)
    engine.bind(model, [operation])
    return engine


def _compare(
    module: nn.Module, operation: Operation, output: Callable[[nn.Module], torch.Tensor]
) -> None:
    """Compares on losses that weigh every output at random, a third of them by zero."""
    plain = copy.deepcopy(module)
    engine = _bound(module, operation)
    weights = torch.randn_like(output(plain))
    weights *= torch.rand_like(weights) > 0.3

    def losses(model: nn.Module) -> torch.Tensor:
        return (torch.tanh(output(model)) * weights).flatten(1).sum(1)

    parameters = [p for p in plain.parameters() if p.requires_grad]
    expected = loop_gradients(losses(plain), parameters)
    assert_rows_close(engine.per_sample_gradients(losses(module)), expected, parameters)


@pytest.fixture(autouse=True)
def _own_randomness():
    with torch.random.fork_rng():
        yield


sizes = st.integers(1, 6)
widths = st.integers(2, 9)  # of a norm over one feature nothing is left but rounding
positions = st.lists(st.integers(1, 5), max_size=2)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("input_trains", [True, False])
@given(batch=sizes, middle=positions, features=widths, seed=st.integers(0, 99))
def test_rows_equal_the_loop(
    name: str, input_trains: bool, batch: int, middle, features: int, seed: int
) -> None:
    torch.manual_seed(seed)
    module, operation = _make(name, features)
    x = torch.randn(batch, *middle, features, requires_grad=input_trains)
    _compare(module, operation, lambda model: model(x))


@given(batch=sizes, shape=st.lists(sizes, min_size=1, max_size=3), seed=sizes)
def test_rows_of_tokens_equal_the_loop(batch: int, shape, seed: int) -> None:
    torch.manual_seed(seed)
    module = VirtualTokens(torch.randn(shape))
    _compare(module, module.operation, lambda model: model(batch))


@given(
    batch=sizes,
    middle=st.lists(sizes, min_size=1, max_size=2),
    rows=sizes,
    padded=st.booleans(),
    seed=sizes,
)
def test_rows_of_an_embedding_equal_the_loop(
    batch: int, middle, rows: int, padded: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    table = nn.Embedding(rows, 3, padding_idx=0 if padded else None)
    operation = Operation(table, "embedding", dict(table.named_parameters()))
    ids = torch.randint(rows, (batch, *middle))
    _compare(table, operation, lambda model: model(ids))


def _saved_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Returns how much autograd keeps for the backward pass, each storage once."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("name", MAKERS)
def test_a_tap_keeps_nothing_that_plain_training_would_not(name: str) -> None:
    module, operation = _make(name, 64)
    x = torch.randn(4, 50, 64, requires_grad=True)
    plain = _saved_bytes(lambda: module(x))
    _bound(module, operation)
    assert _saved_bytes(lambda: module(x)) <= plain


def _embedding(**options: object) -> tuple[nn.Embedding, Operation]:
    table = nn.Embedding(5, 3, **options)
    return table, Operation(table, "embedding", dict(table.named_parameters()))


def test_positions_that_the_batch_shares_are_right_or_an_error() -> None:
    table, operation = _embedding()
    x, positions = torch.randn(4, 5, 3), torch.arange(5)[None]
    _compare(table, operation, lambda model: x[:1] + model(positions))
    engine = _bound(table, operation)
    with pytest.raises(ValueError, match="mixes examples"):
        engine.per_sample_gradients((x + table(positions)).flatten(1).sum(1))
    with pytest.raises(ValueError, match=r"ids of shape \(batch, ...\), got \(5,\)"):
        table(positions[0])


def test_a_prompt_that_is_expanded_behind_its_back_is_refused() -> None:
    module = VirtualTokens(torch.randn(2, 3))
    engine = _bound(module, module.operation)
    shared = module(1).expand(4, 2, 3)  # the batch sums before the tap sees it
    with pytest.raises(ValueError, match=r"shape \(4, 2, 3\), got \(1, 2, 3\)"):
        engine.per_sample_gradients(shared.flatten(1).sum(1))


class _Centred(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - 1


@pytest.mark.parametrize(
    "module",
    [GemmaRMSNorm(4), _Centred(4), nn.LayerNorm((3, 4)), nn.GroupNorm(2, 4)],
    ids=lambda module: type(module).__name__,
)
def test_a_norm_of_another_formula_is_refused(module: nn.Module) -> None:
    operation = Operation(module, "norm", dict(module.named_parameters()))
    with pytest.raises(ValueError, match="LayerNorm or RMSNorm over one dimension"):
        _bound(module, operation)


def test_one_plus_weight_is_refused_under_a_known_name_too() -> None:
    class LlamaLike(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + self.weight) / self.weight

    module = LlamaLike(4)
    operation = Operation(module, "norm", dict(module.named_parameters()))
    with pytest.raises(ValueError, match="computes something else"):
        _bound(module, operation)


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_an_embedding_with_a_mind_of_its_own_is_refused(options) -> None:
    table, operation = _embedding(**options)
    with pytest.raises(ValueError, match="mix examples"):
        _bound(table, operation)


def test_the_bias_of_another_formula_is_refused() -> None:
    module = _Centred(4)
    module.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="got _Centred, which may compute"):
        _bound(module, Operation(module, "bias", {"bias": module.bias}))


@pytest.mark.parametrize("kind", ["linear", "bias", "embedding"])
def test_a_module_of_another_kind_is_refused(kind) -> None:
    module = nn.Conv1d(2, 2, 1)
    parameters = {"weight": module.weight, "bias": module.bias}
    with pytest.raises(ValueError, match="got Conv1d"):
        _bound(module, Operation(module, kind, parameters))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, operation = _make("module", 3)
        self.operation = operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(torch.sin(self.part(x)))


def test_a_module_used_twice_adds_both_uses() -> None:
    torch.manual_seed(0)
    twice = _Twice()
    x = torch.randn(4, 5, 3)
    _compare(twice, twice.operation, lambda model: model(x))


def test_a_module_may_be_bound_again() -> None:
    torch.manual_seed(0)
    module, operation = _make("module", 3)
    x = torch.randn(4, 5, 3)
    rows = [
        _bound(module, operation).per_sample_gradients(module(x).flatten(1).sum(1))
        for _ in range(2)
    ]
    assert torch.equal(*rows)


def test_a_module_may_be_checkpointed() -> None:
    torch.manual_seed(0)
    module, operation = _make("module-bilinear", 6)
    x = torch.randn(4, 5, 6, requires_grad=True)
    _compare(module, operation, lambda model: checkpoint(model, x, use_reentrant=False))


@pytest.mark.parametrize("shape", [(1, 6), (4, 6), (1, 5, 6), (4, 5, 6)])
def test_a_module_under_autocast_is_close_and_stays_so(shape) -> None:
    torch.manual_seed(0)
    module, operation = _make("module-bilinear", 6)
    plain, x = copy.deepcopy(module), torch.randn(shape)
    engine = _bound(module, operation)
    expected = loop_gradients(
        plain(x).flatten(1).square().sum(1), [plain.down, plain.up]
    )
    for _ in range(2):  # a cast kept from the first pass would be dead in the second
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
            assert y.dtype == torch.bfloat16
        rows = engine.per_sample_gradients(y.float().flatten(1).square().sum(1))
        assert relative_error(rows, expected) < 0.05


def test_a_module_with_dropout_is_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
    operation = Operation(module, "module", dict(module.named_parameters()))
    with pytest.raises(ValueError, match=r"without dropout, got p = 0\.1"):
        _bound(module, operation)


def test_a_module_without_its_parameters_names_is_refused() -> None:
    module = nn.Linear(3, 3)
    parameters = {"weight": module.bias, "bias": module.weight}
    with pytest.raises(ValueError, match="names within Linear, got weight, bias"):
        _bound(module, Operation(module, "module", parameters))
