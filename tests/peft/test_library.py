"""What the `peft` library is to load again, and what its methods compute."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedpeft.interfaces import PeftAdapter, PeftMethod
from fedpeft.oracle import relative_error
from fedpeft.peft import (
    IA3,
    METHODS,
    AdaLora,
    Bottleneck,
    LoKr,
    Lora,
    RandLora,
    Shira,
    TokenRows,
    Vera,
)
from tests.helpers import FAMILIES, tiny_bert, tiny_llama, toy, toy_inputs

METHOD: dict[str, PeftMethod] = {
    "lora": Lora(rank=4, lora_alpha=3),
    "lora-frozen-a": Lora(rank=4, freeze_a=True, first_layer=1),
    "lora-stabilized": Lora(rank=4, rank_stabilized=True),
    "lora-dora": Lora(rank=4, dora=True),
    "lora-pissa": Lora(rank=4, init="pissa", target_modules=("fc1", "dense", "k_proj")),
    "lora-pissa-stabilized": Lora(rank=4, init="pissa", rank_stabilized=True),
    "lora-pissa-dora": Lora(rank=4, init="pissa", dora=True),
    "adalora": AdaLora(initial_rank=4, target_rank=2),
    "vera": Vera(rank=16),
    "randlora": RandLora(8, 8.0),
    "lokr": LoKr(rank=4),
    "lokr-low-rank": LoKr(rank=2, factor=2),
    "shira": Shira(density=0.1),
    "ia3": IA3(),
    "token_rows": TokenRows(token_ids=(40, 7, 0, 21)),
}
METHOD |= {  # whatever else the menu exports
    name: method()
    for name, method in METHODS.items()
    if name not in METHOD and method.to_peft is not PeftMethod.to_peft
}

# All that a stranger needs: no line of this project.
LOADS_THEM = """
import sys, warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

folder = Path(sys.argv[1])
inputs = load_file(folder / "inputs.safetensors")
for adapter in sorted(path for path in folder.iterdir() if path.name[:2] == "a-"):
    backbone = AutoModel.from_pretrained(folder / "backbone").eval()
    model = PeftModel.from_pretrained(backbone, adapter).eval()
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    save_file({"hidden": hidden}, adapter / "hidden.safetensors")
assert not any(name.startswith("fedpeft") for name in sys.modules)
"""


def _save(adapter: PeftAdapter, folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
    tensors = {f"base_model.model.{n}": t for n, t in adapter.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_load_in_a_fresh_process(family: str, tmp_path: Path) -> None:
    inputs, expected = toy_inputs(family, 4), {}
    save_file(inputs, tmp_path / "inputs.safetensors")
    FAMILIES[family]().save_pretrained(tmp_path / "backbone")
    for name, method in METHOD.items():
        if family == "vit" and name == "token_rows":
            continue
        backbone = toy(method, family=family).plain.backbone.eval()
        with torch.no_grad():
            expected[name] = backbone(**inputs).last_hidden_state
        _save(method.to_peft(backbone), tmp_path / f"a-{name}")
    command = [sys.executable, "-I", "-c", LOADS_THEM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain = FAMILIES[family]()(**inputs).last_hidden_state
    for name, hidden in expected.items():
        loaded = load_file(tmp_path / f"a-{name}" / "hidden.safetensors")["hidden"]
        assert relative_error(loaded, hidden) < 1e-5, name
        assert relative_error(loaded, plain) > 1e-3, name


def test_a_method_that_the_library_has_not_says_so() -> None:
    with pytest.raises(ValueError, match="that the peft library knows, got Bottleneck"):
        Bottleneck().to_peft(tiny_bert())


def _trained(method: PeftMethod, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = tiny_bert()
        method.attach(backbone)
    return backbone.state_dict() | dict(backbone.named_buffers())


def _number(method: PeftMethod, family: str = "bert") -> int:
    backbone = FAMILIES[family]()
    method.attach(backbone)
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "bert", "llama"),
    [
        (Lora(rank=4, dora=True), 4 * (4 * 64 + 32), 2 * (4 * 112 + 48)),
        (Lora(rank=4, init="pissa"), 4 * 4 * 64, 2 * 4 * 112),
        (AdaLora(initial_rank=4, target_rank=2), 4 * 4 * 65, 2 * 4 * (65 + 49)),
        (Vera(rank=5), 4 * (5 + 32), 2 * (5 + 5 + 48)),
        # gamma: one diagonal a product; lambda: one value a product and rank
        (RandLora(rank=8), 4 * 4 * (8 + 32), 2 * (4 * (8 + 32) + 2 * (8 + 16))),
        (LoKr(rank=1, factor=2), 4 * (2 * 2 + 16 + 16), 2 * (2 * 4 + 32 + 16 + 8)),
        (Shira(density=0.25), 4 * 256, 2 * (256 + 128)),
    ],
    ids=str,
)
def test_number_of_trainable_parameters(method, bert: int, llama: int) -> None:
    assert _number(method) == bert
    assert _number(method, "llama") == llama


@pytest.mark.parametrize(
    "method", [Vera(rank=4), RandLora(rank=8), Shira(density=0.1), Lora(init="pissa")]
)
def test_what_never_travels_follows_from_the_seed(method: PeftMethod) -> None:
    first, second = _trained(method), _trained(method)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", [Vera(rank=4), RandLora(rank=8), Shira(density=0.1)])
def test_another_seed_gives_other_random_parts(method: PeftMethod) -> None:
    first, second = _trained(method), _trained(method, seed=1)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_pissa_draws_nothing_that_counts() -> None:
    first, second = _trained(Lora(init="pissa")), _trained(Lora(init="pissa"), seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pissa_takes_the_principal_part_out_of_the_frozen_weight() -> None:
    backbone, plain = tiny_bert(), tiny_bert()
    Lora(rank=4, init="pissa", first_layer=1).attach(backbone)
    query = backbone.encoder.layer[1].attention.self.query
    whole = torch.linalg.svdvals(plain.encoder.layer[1].attention.self.query.weight)
    rest = torch.linalg.svdvals(query.base_layer.weight)
    assert (rest[:28] - whole[4:]).abs().max() < 1e-6
    assert rest[28:].max() < 1e-6
    down = query.lora_A["default"].weight
    assert (down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all()


def test_dora_scales_rows_to_the_trained_length() -> None:
    backbone = tiny_bert()
    Lora(rank=2, dora=True, first_layer=1).attach(backbone)
    query = backbone.encoder.layer[1].attention.self.query
    magnitude = query.lora_magnitude_vector["default"].weight
    nn.init.ones_(query.lora_B["default"].weight)
    nn.init.constant_(magnitude, 3.0)
    weight = query(torch.eye(32)).t() - query.base_layer.bias.unsqueeze(1)
    assert (weight.norm(dim=1) - 3).abs().max() < 1e-5


def test_shira_trains_entries_that_differ_by_layer() -> None:
    backbone = tiny_bert()
    operations = Shira(density=0.1).attach(backbone)
    for operation in operations:
        nn.init.ones_(operation.parameters["shira_weight.default"])
        changed = operation.module.get_delta_weight("default")
        assert changed.sum() == changed.count_nonzero() == 102  # of 1024
    first, second, *_ = (op.module.get_delta_weight("default") for op in operations)
    assert not torch.equal(first, second)


def test_a_density_that_the_library_cannot_hold_is_refused_at_export_alone() -> None:
    backbone = tiny_llama()
    Shira(density=1.0).attach(backbone)
    with pytest.raises(ValueError, match=r"lower density .* layers.0.self_attn.v_proj"):
        Shira(density=1.0).to_peft(backbone)


def _refused() -> Iterator[object]:
    for make, message in (
        (lambda: Lora(lora_alpha=0), "Expected lora_alpha > 0, got 0."),
        (lambda: AdaLora(initial_rank=2), "Expected target_rank <= 2, the initial_"),
        (lambda: AdaLora(target_rank=0), "Expected target_rank >= 1, got 0."),
        (lambda: Vera(rank=0), "Expected rank >= 1, got 0."),
        (lambda: RandLora(lora_alpha=-1.0), "Expected lora_alpha > 0, got -1.0."),
        (lambda: LoKr(factor=0), "Expected factor >= 1, got 0."),
        (lambda: Shira(density=0.0), "Expected 0 < density <= 1, got 0.0."),
        (lambda: Shira(first_layer=-1), "Expected first_layer >= 0, got -1."),
    ):
        yield pytest.param(make, message, id=message)


@pytest.mark.parametrize(("make", "message"), list(_refused()))
def test_impossible_hyperparameters_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "field"),
    [(Lora(rank=17), "rank"), (AdaLora(initial_rank=17), "initial_rank")],
)
def test_a_rank_above_the_layers_size_names_both(method, field: str) -> None:
    message = (
        rf"Expected {field} <= 16, the smaller side of layers.0.self_attn.v_proj, "
        r"got 17\.$"
    )
    with pytest.raises(ValueError, match=message):
        method.attach(tiny_llama())


@pytest.mark.parametrize("method", [Lora, AdaLora, Vera, RandLora, LoKr, Shira])
def test_a_target_that_is_no_linear_layer_is_refused(method) -> None:
    with pytest.raises(ValueError, match="are linear layers, got Embedding"):
        method(target_modules=("word_embeddings",)).attach(tiny_bert())


def test_a_target_that_does_not_exist_lists_those_that_do_the_nearest_first() -> None:
    message = (
        r"Expected target_modules that end the name of a layer, got qeury: there is "
        r"none such; the linear ones end in query, key, value, dense\.$"
    )
    with pytest.raises(ValueError, match=message):
        Lora(target_modules=("qeury",)).attach(tiny_bert())
    with pytest.raises(ValueError, match=r"end in v_proj, .* gate_proj, .*down_proj"):
        Vera(target_modules=("self_attn.vproj",)).attach(tiny_llama())


def test_randlora_refuses_a_machine_that_would_draw_other_matrices(monkeypatch) -> None:
    monkeypatch.setattr("peft.tuners.randlora.model.is_bf16_available", lambda: False)
    with pytest.raises(ValueError, match="machine with bfloat16"):
        RandLora(rank=8).attach(tiny_bert())
