"""Weights in a foreign format -> a folder that `transformers` loads, made once.

All weights come out in float32 and safetensors, so that loading unpickles nothing and
needs neither `onnx` nor `gguf`. Heavy packages are imported by the conversion alone, so
that whoever only locates an asset does not wait for them.
"""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.assets.catalogue import Asset
from fedpeft.errors import AssetError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Converter:
    """How one format is read.

    Attributes:
        package: what reads the format; an extra, since only a conversion needs it.
        run: reads the file and fills the folder.
    """

    package: str
    run: Callable[[Path, Path], None]


def check_converter(asset: Asset) -> None:
    """Refuses before a long download what could not be converted after it.

    Raises:
        AssetError: if the package that reads the format is not installed.
    """
    if asset.convert is None:
        return
    package = _CONVERTERS[asset.convert].package
    if find_spec(package) is None:
        raise AssetError(
            f"Expected the package {package} to convert {asset.name!r}, but it is not "
            'installed; run `pip install "fedpeft[assets]"`, then '
            f"`fedpeft assets pull {asset.name}`."
        )


def convert(asset: Asset, folder: Path) -> None:
    """Makes the asset's `path` of its first member, which goes, below `folder`.

    Raises:
        AssetError: if the file is not as the converter knows it.
        OSError: if a file cannot be written.
    """
    if asset.convert is None:
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = folder / asset.members[0]
    try:
        _CONVERTERS[asset.convert].run(file, folder / asset.path)
    except Exception as error:  # whatever another release of a library raises
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise AssetError(
            f"Expected {asset.convert} to convert {asset.name!r}, but it failed: "
            f"{reason}; install the tested versions (constraints.txt)."
        ) from None
    file.unlink()


def _dinov2_from_onnx(file: Path, folder: Path) -> None:
    """A ViT-S/14 inside an ONNX graph -> ``Dinov2Model``.

    The mask token, of use in pre-training only, is not in the graph; it is zero.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = Dinov2Model(config)
    tensors = _named_tensors(file)
    tensors["embeddings.mask_token"] = torch.zeros(1, 384)
    model.load_state_dict(tensors, strict=True)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_IMAGENET, indent=2))


_IMAGENET = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""What the images of the pre-training went through; `transformers` reads it."""

# As the graph calls an attention's layers, and as `transformers` does.
_RENAMED = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}


def _named_tensors(file: Path) -> "dict[str, torch.Tensor]":
    """Returns the backbone's tensors in the graph by the names of ``Dinov2Model``.

    Two kinds have lost their names. A linear weight, stored ``(in, out)``, is known by
    the bias that is added to its product. The position embeddings are stored in two
    parts, the class token's and those of the 37 x 37 patches, known by their shapes.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    stored = {
        entry.name: torch.tensor(numpy_helper.to_array(entry))
        for entry in graph.initializer
    }
    tensors = {name: stored[name] for name in stored if name.startswith(_BACKBONE)}
    products = {
        node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"
    }
    for node in graph.node:
        if node.op_type == "Add":
            weights = [products[name] for name in node.input if name in products]
            biases = [name for name in node.input if name.endswith(".bias")]
            for weight, bias in zip(weights, biases, strict=False):
                name = bias.removesuffix("bias") + "weight"
                tensors[name] = stored[weight].T.contiguous()
    positions = [
        stored[name]
        for shape in ((1, 1, 384), (1, 1369, 384))
        for name in stored
        if name.startswith("onnx::") and stored[name].shape == shape
    ]
    tensors[f"{_BACKBONE}embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return {_renamed(name): tensor for name, tensor in tensors.items()}


_BACKBONE = "backbone."


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name.removeprefix(_BACKBONE)


def _llama_from_gguf(file: Path, folder: Path) -> None:
    """A quantised Llama in GGUF -> ``LlamaForCausalLM``, its tokenizer and template.

    The weights are those of the quantised file: less exact than the original's.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    here = {"gguf_file": file.name, "local_files_only": True}
    with redirect_stderr(io.StringIO()):  # another bar, which cannot be disabled
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **here)
        quantised = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **here
        )
    # A model of its own, as one that says it is quantised cannot be saved.
    config = quantised.config.to_dict()
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaForCausalLM.config_class.from_dict(config))
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_CONVERTERS = {
    "dinov2-from-onnx": _Converter("onnx", _dinov2_from_onnx),
    "llama-from-gguf": _Converter("gguf", _llama_from_gguf),
}
