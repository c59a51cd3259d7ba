"""What NOLA, one-bit adapters, Fed-SB and masks compute, refuse and export.

What concerns masks alone is in test_mask.py.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from fedpeft.interfaces import PeftMethod
from fedpeft.peft import FedSB, Mask, Nola, OneBit
from fedpeft.peft._beside import Beside
from fedpeft.peft.onebit import Quantised, gaussian_codes
from tests.helpers import FAMILIES, tiny_bert, tiny_llama, toy_inputs

QUERY = "encoder.layer.0.attention.self.query"
METHODS: dict[str, PeftMethod] = {
    "nola": Nola(rank=3, num_bases=5),
    "nola-frozen-alpha": Nola(rank=2, num_bases=4, freeze_alpha=True, lora_alpha=3),
    "onebit": OneBit(rank=3),
    "onebit-top": OneBit(
        rank=2, bits=3, first_layer=1, target_modules=("fc2", "dense", "up_proj")
    ),
    "fedsb": FedSB(rank=4, scale=0.5),
    "fedsb-svd": FedSB(rank=3, init="svd"),
    "mask": Mask(density=0.02),
    "mask-dense": Mask(density=0.3, first_layer=1),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _trained(method: PeftMethod, backbone: nn.Module) -> nn.Module:
    """Attaches a method and leaves the identity."""
    method.attach(backbone)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 3)
    return backbone.eval()


def _hidden(backbone: nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        return backbone(**toy_inputs(family, 3)).last_hidden_state


@pytest.mark.parametrize(
    ("method", "bert", "vit", "llama"),
    [
        (Nola(), *3 * (2 * 2 * 2 * 64,)),
        (Nola(num_bases=5, freeze_alpha=True), *3 * (2 * 2 * 5,)),
        (OneBit(rank=4), 2 * 2 * 4 * 64, 2 * 2 * 4 * 64, 2 * 4 * (64 + 48)),
        (FedSB(rank=4), *3 * (2 * 2 * 16,)),
        (FedSB(rank=4, first_layer=1), *3 * (2 * 16,)),
        (Mask(density=1 / 64), 2 * (4 * 16 + 2 * 32), 2 * (4 * 16 + 2 * 32), 2 * 144),
        (Mask(density=1.0, target_modules=("query", "q_proj")), *3 * (2 * 1024,)),
    ],
)
def test_number_of_trainable_parameters(method, bert, vit, llama) -> None:
    for family, count in (("bert", bert), ("vit", vit), ("llama", llama)):
        backbone = FAMILIES[family]()
        method.attach(backbone)
        trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        assert trainable == count, family


@each_family
@each_method
def test_merged_weights_compute_the_same_under_the_plain_names(
    family: str, method: PeftMethod
) -> None:
    backbone = _trained(method, FAMILIES[family]())
    expected = _hidden(backbone, family)
    assert (expected - _hidden(FAMILIES[family]().eval(), family)).abs().max() > 1e-3
    method.merge(backbone)
    assert (_hidden(backbone, family) - expected).abs().max() < 1e-5
    plain = FAMILIES[family]()
    assert [n for n, _ in backbone.named_modules()] == [
        n for n, _ in plain.named_modules()
    ]
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    assert type(next(m for m in backbone.modules() if isinstance(m, nn.Linear))) is (
        nn.Linear
    )


RELOAD = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel
torch.sparse.check_sparse_tensor_invariants.enable()
root = Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
outputs = {}
for folder in root.iterdir():
    if (folder / "adapter_config.json").exists():
        options = {} if sys.argv[2] == "llama" else {"add_pooling_layer": False}
        plain = AutoModel.from_pretrained(root / "plain", **options)
        model = PeftModel.from_pretrained(plain, folder).eval()
        with torch.no_grad():
            outputs[folder.name] = model(**inputs).last_hidden_state
save_file(outputs, root / "outputs.safetensors")
"""


@each_family
def test_an_export_loads_in_a_fresh_process(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path / "plain")
    save_file(toy_inputs(family, 3), tmp_path / "inputs.safetensors")
    expected = {}
    for name, method in METHODS.items():
        backbone = _trained(method, FAMILIES[family]())
        expected[name] = _hidden(backbone, family)
        adapter = method.to_peft(backbone)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
        tensors = {f"base_model.model.{n}": t for n, t in adapter.tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
    # A tensor left out is a warning of the library's; its own FutureWarnings are not.
    strict = ["-W", "error", "-W", "ignore::FutureWarning"]
    command = [sys.executable, *strict, "-c", RELOAD, str(tmp_path), family]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    actual = load_file(tmp_path / "outputs.safetensors")
    assert actual.keys() == expected.keys()
    for name in expected:
        assert (actual[name] - expected[name]).abs().max() < 1e-5, name


def test_nola_adds_the_scaled_product_of_two_sums() -> None:
    backbone = tiny_bert()
    Nola(rank=2, num_bases=3, lora_alpha=8).attach(backbone)
    layer = backbone.get_submodule(QUERY)
    down, up = layer.added
    nn.init.constant_(up.coefficients, 2.0)
    x = torch.randn(4, 32)
    product = (2 * up.bases.sum(0)) @ down.bases.sum(0)  # alpha starts at one
    expected = layer.base(x) + (8 / 2) * x @ product.T
    assert (layer(x) - expected).abs().max() < 1e-5


def test_nolas_bases_are_drawn_again_and_never_stored() -> None:
    states, bases = [], []
    for _ in range(2):
        backbone = tiny_bert()
        torch.manual_seed(7)
        Nola(rank=2, num_bases=3).attach(backbone)
        states.append(backbone.state_dict())
        bases.append(backbone.get_submodule(QUERY).added.down.bases)
    assert torch.equal(*bases)
    added = [name for name in states[0] if "added" in name]
    assert len(added) == 2 * 2 * 2
    assert all(name.endswith("coefficients") for name in added)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_codes_are_medians_of_what_is_nearest_to_them(bits: int) -> None:
    codes = torch.tensor(gaussian_codes(bits), dtype=torch.float64)
    assert len(codes) == 2**bits
    assert (codes + codes.flip(0)).abs().max() < 1e-6
    normal = torch.distributions.Normal(0.0, 1.0)
    edges = torch.cat((torch.zeros(1), normal.cdf((codes[1:] + codes[:-1]) / 2)))
    edges = torch.cat((edges, torch.ones(1)))
    assert (normal.cdf(codes) - (edges[1:] + edges[:-1]) / 2).abs().max() < 1e-4


def test_one_bit_leaves_two_values_and_the_straight_through_gradient() -> None:
    latent = torch.tensor([[1.0, 3.0], [1.0, 3.0]])  # mean 2, standard deviation 1
    layer = Quantised(latent, 1)
    code = gaussian_codes(1)[1]
    expected = torch.tensor([[2 - code, 2 + code]] * 2)
    assert (layer.weight - expected).abs().max() < 1e-6
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (layer.weight * upstream).sum().backward()
    assert torch.equal(layer.latent.grad, upstream)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_constant_latent_weight_is_its_own_copy(value: float) -> None:
    layer = Quantised(torch.full((2, 2), value), 2)
    assert (layer.weight == value).all()
    layer(torch.ones(1, 2)).sum().backward()
    assert (layer.latent.grad == 1).all()


def test_more_bits_are_closer() -> None:
    latent = torch.randn(40, 40)
    errors = [
        (Quantised(latent, bits).weight - latent).abs().mean() for bits in range(1, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * errors[0]


@pytest.mark.parametrize("init", ["random", "svd"])
def test_fedsb_projects_between_orthonormal_matrices(init) -> None:
    backbone = tiny_bert()
    FedSB(rank=4, init=init).attach(backbone)
    layer = backbone.get_submodule(QUERY)
    down, core, up = layer.added
    assert (down.weight @ down.weight.T - torch.eye(4)).abs().max() < 1e-6
    assert (up.weight.T @ up.weight - torch.eye(4)).abs().max() < 1e-6
    assert (core.weight == 0).all()
    if init == "svd":
        weight = tiny_bert().get_submodule(QUERY).weight
        spectrum = up.weight.T @ weight @ down.weight.T
        largest = torch.linalg.svdvals(weight)[:4]
        assert (spectrum - largest.diag()).abs().max() < 1e-5
        assert all(row[row.abs().argmax()] > 0 for row in down.weight)


def test_the_svd_needs_no_seed() -> None:
    first, second = tiny_bert(), tiny_bert()
    FedSB(init="svd").attach(first)
    torch.rand(1)
    FedSB(init="svd").attach(second)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def _weights(
    method: PeftMethod, trained: list[list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Returns the merged weight of one layer for each trainable state."""
    torch.manual_seed(3)
    backbone = tiny_llama()
    method.attach(backbone)
    weights = []
    for state in trained:
        copied = copy.deepcopy(backbone)
        own = [p for p in copied.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, value in zip(own, state, strict=True):
                parameter.copy_(value)
        method.merge(copied)
        weights.append(copied.layers[0].self_attn.q_proj.weight.double())
    return weights


@pytest.mark.parametrize(
    "method",
    [
        FedSB(rank=3),
        FedSB(rank=3, init="svd"),
        Nola(rank=3, num_bases=4, freeze_alpha=True),
        Mask(density=0.1),
    ],
    ids=lambda method: type(method).__name__,
)
@given(clients=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_mean_of_the_products_is_the_product_of_the_mean(
    method, clients: int, seed: int
) -> None:
    backbone = tiny_llama()
    method.attach(backbone)
    shapes = [p.shape for p in backbone.parameters() if p.requires_grad]
    torch.manual_seed(seed)
    states = [[torch.randn(shape) for shape in shapes] for _ in range(clients)]
    mean = [torch.stack(parts).mean(0) for parts in zip(*states, strict=True)]
    *each, of_mean = _weights(method, [*states, mean])
    assert (torch.stack(each).mean(0) - of_mean).abs().max() < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mask(density=0.0),
        lambda: Mask(density=1.5),
        lambda: Mask(density=float("nan")),
        lambda: Mask(source="private"),
        lambda: Mask(public="x"),
        lambda: Mask(first_layer=-1),
        lambda: Nola(rank=0),
        lambda: Nola(num_bases=0),
        lambda: Nola(lora_alpha=0),
        lambda: OneBit(bits=0),
        lambda: OneBit(bits=9),
        lambda: OneBit(lora_alpha=-1),
        lambda: FedSB(rank=0),
        lambda: FedSB(scale=0),
        lambda: FedSB(init="gradient"),
    ],
)
def test_impossible_hyperparameters_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"^Expected [^\n]*\.$"):
        make()


@pytest.mark.parametrize("method", [Nola, OneBit, FedSB])
def test_a_rank_above_a_layers_size_is_refused_by_name(method) -> None:
    expected = rf"rank <= 32, the size of {QUERY} \(32 x 32\), got 33"
    with pytest.raises(ValueError, match=expected):
        method(rank=33).attach(tiny_bert())
    with pytest.raises(ValueError, match=r"rank <= 16, .*v_proj \(16 x 32\), got 17"):
        method(rank=17).attach(tiny_llama())


@pytest.mark.parametrize("method", [Nola, OneBit, FedSB, Mask])
def test_target_modules_are_linear_layers_that_exist(method) -> None:
    with pytest.raises(ValueError, match=r"linear layer.* got Embedding"):
        method(target_modules=("word_embeddings",)).attach(tiny_bert())
    with pytest.raises(ValueError, match="got nothing"):
        method(target_modules=("nothing",)).attach(tiny_bert())
    with pytest.raises(ValueError, match="first_layer <= 1"):
        method(first_layer=2).attach(tiny_bert())


def test_what_a_method_adds_lies_beside_the_frozen_layer() -> None:
    backbone = tiny_bert()
    FedSB(rank=2).attach(backbone)
    layer = backbone.get_submodule(QUERY)
    assert isinstance(layer, Beside)
    frozen = {n for n, p in layer.named_parameters() if not p.requires_grad}
    fixed = {"added.down.weight", "added.up.weight"}
    assert frozen == {"base.weight", "base.bias", *fixed}
