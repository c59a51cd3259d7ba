"""The three formats: an adapter, a whole model, the bare tensors."""

import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GenerationConfig,
)

from fedpeft.durable import make_directory, sync_directory
from fedpeft.errors import RunError
from fedpeft.export.card import write_card
from fedpeft.export.stored import Trained
from fedpeft.tasks import CausalLM, ImageClassification, ImageClassifier
from fedpeft.tensors import Tensors, with_prefix
from fedpeft.wording import nearest

_Write: TypeAlias = Callable[[Trained, Path], None]


def write_export(trained: Trained, format: str, output: Path) -> None:
    """Writes the model and its card into a new directory.

    **Guarantees**: the directory appears whole or not at all, and its files name no
    path of this machine. A merged model was compared with the trained one on a drawn
    input.

    Args:
        trained: the model; it is used up, since merging changes it in place.
        format: one of :data:`FORMATS`.
        output: the directory; it may exist, but hold nothing.

    Raises:
        RunError: for an unknown format, an output that holds something already, or a
            method that cannot be written so; it names the formats that work.
    """
    check_export(format, output)
    make_directory(output.absolute().parent)
    parent = output.absolute().parent
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as work:
        folder = Path(work) / "export"
        folder.mkdir()
        # First: what it says of the tensors' names holds before anything is merged.
        write_card(trained, format, folder)
        try:
            FORMATS[format](trained, folder)
        except ValueError as error:
            raise _impossible(trained, format, error) from None
        _sync(folder)
        folder.rename(output)
    sync_directory(parent)


def check_export(format: str, output: Path) -> None:
    """Refuses what can be refused before anything is loaded.

    Raises:
        RunError: for an unknown format, or an output that holds something already.
    """
    if format not in FORMATS:
        raise RunError(
            f"--format: expected one of {', '.join(FORMATS)}, got {format!r}"
            f"{nearest(format, FORMATS)}"
        )
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise RunError(
            f"Expected a new output directory, {output} holds something already: "
            "choose another with --output."
        )


def _write_peft(trained: Trained, folder: Path) -> None:
    """Writes an adapter as the `peft` library loads it, with the head beside it."""
    module: Any = trained.model.module
    adapter = trained.method.to_peft(module.backbone)
    is_causal = isinstance(module, CausalLM)
    place = "base_model.model"
    if is_causal:
        place += f".{module.backbone.base_model_prefix}"
    config = adapter.config | {
        "base_model_name_or_path": trained.backbone,
        "task_type": "CAUSAL_LM" if is_causal else None,
        "auto_mapping": None,
        "revision": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = with_prefix(place, adapter.tensors)
    _write_tensors_to(folder / "adapter_model.safetensors", tensors, trained)
    _write_head(trained, folder)


def _write_merged(trained: Trained, folder: Path) -> None:
    """Writes a whole model as `transformers` loads it."""
    module = trained.model.module
    inputs = _drawn_inputs(trained)
    with torch.inference_mode():
        before = module(**inputs)
    trained.method.merge(module.backbone)
    whole = _whole(trained)
    with torch.inference_mode():
        is_whole = whole is not module.backbone
        after = whole(**inputs).logits if is_whole else module(**inputs)
    error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-6))
    if not error < 1e-3:
        raise ValueError(
            f"Expected the merged model to compute the same, got logits that are off "
            f"by {error:.1e}."
        )
    whole.save_pretrained(folder)
    if not is_whole:
        _write_head(trained, folder)
    task: Any = trained.model.task
    if isinstance(task, ImageClassification):
        settings = json.dumps(_preprocessor(task), indent=2)
        (folder / "preprocessor_config.json").write_text(settings + "\n")
    else:
        task.tokenizer.save_pretrained(folder)


def _write_tensors(trained: Trained, folder: Path) -> None:
    """Writes the trained tensors and the method's constants under their own names."""
    tensors = trained.run.tensors
    _write_tensors_to(folder / "adapter.safetensors", tensors, trained)


FORMATS: dict[str, _Write] = {
    "peft": _write_peft,
    "merged": _write_merged,
    "safetensors": _write_tensors,
}
"""How a model may leave, by name."""


def _impossible(trained: Trained, format: str, error: ValueError) -> RunError:
    """Returns what to say of a method that has no such format."""
    possible = ["safetensors"]
    others = {"merged": trained.method.merge, "peft": trained.method.to_peft}
    del others[format]
    for name, attempt in others.items():
        try:
            attempt(trained.model.module.backbone)
            possible.insert(0, name)
        except ValueError:
            continue
    reason = str(error).splitlines()[0].rstrip(".")
    return RunError(
        f"--format {format}: {reason}. What works with "
        f"{trained.run.config.peft.name}: {', '.join(possible)}."
    )


def _whole(trained: Trained) -> Any:
    """Returns the model with its last layer, of a class of `transformers`.

    For texts there is none with a mean over tokens: the backbone alone.
    """
    module: Any = trained.model.module
    backbone = module.backbone
    config = copy.deepcopy(backbone.config)
    if isinstance(module, ImageClassifier):
        _name_classes(config, trained)
        whole = _shell(AutoModelForImageClassification, config)
        setattr(whole, whole.base_model_prefix, backbone)
        whole.classifier = module.head
        return whole.eval()
    if isinstance(module, CausalLM):
        table = backbone.get_input_embeddings()
        config.tie_word_embeddings = table.weight is module.output.weight
        whole = _shell(AutoModelForCausalLM, config)
        setattr(whole, whole.base_model_prefix, backbone)
        whole.set_output_embeddings(module.output)
        try:
            source = backbone.name_or_path
            whole.generation_config = GenerationConfig.from_pretrained(source)
        except OSError:
            pass  # the backbone brings no settings of its own
        return whole.eval()
    return backbone


def _shell(kind: Any, config: Any) -> Any:
    """Returns a model without values, for others' layers to be put in."""
    with torch.device("meta"):
        return kind.from_config(config)


def _name_classes(config: Any, trained: Trained) -> None:
    data, number = trained.run.config.data, trained.run.num_labels
    labels = data.labels or [f"LABEL_{position}" for position in range(number)]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: position for position, label in enumerate(labels)}
    several = "multi_label_classification"
    config.problem_type = several if data.multi_label else "single_label_classification"


def _drawn_inputs(trained: Trained) -> Tensors:
    """Returns an input that is nobody's."""
    task: Any = trained.model.task
    rng = torch.Generator().manual_seed(0)
    if isinstance(task, ImageClassification):
        shape = (2, 3, task.image_size, task.image_size)
        return {"pixel_values": torch.randn(shape, generator=rng)}
    backbone: Any = trained.model.module.backbone
    ids = torch.randint(backbone.config.vocab_size, (2, 4), generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _preprocessor(task: ImageClassification) -> dict[str, object]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": task.image_size, "width": task.image_size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(task.mean),
        "image_std": list(task.deviation),
    }


def _write_head(trained: Trained, folder: Path) -> None:
    head: nn.Linear | None = trained.model.module.head
    if head is not None:
        tensors = {name: p.detach() for name, p in head.named_parameters()}
        _write_tensors_to(folder / "head.safetensors", tensors, trained)


def _write_tensors_to(path: Path, tensors: Tensors, trained: Trained) -> None:
    metadata = {
        "format": "pt",
        "backbone": trained.backbone,
        "fingerprint": trained.model.fingerprint,
        "config_hash": trained.run.result["config_hash"],
    }
    save_file(tensors, path, metadata=metadata)


def _sync(folder: Path) -> None:
    """Puts the files of a directory on disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(folder)
