"""Formats that need their backbone: an adapter for the `peft` library, bare tensors."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fedpeft.export.stored import Trained
from fedpeft.tasks import CausalLM
from fedpeft.tensors import Tensors, with_prefix


def write_peft(trained: Trained, folder: Path) -> None:
    """Writes an adapter as the `peft` library loads it, with the head beside it.

    Raises:
        ValueError: if that library has no such method, or has it do more.
    """
    module: Any = trained.model.module
    adapter = trained.method.to_peft(module.backbone)
    is_causal = isinstance(module, CausalLM)
    is_tied = is_causal and module.backbone.config.tie_word_embeddings
    if is_tied and adapter.config["peft_type"] == "TRAINABLE_TOKENS":
        raise ValueError(
            "Expected an output layer with a table of its own, got one that shares its "
            "rows with the input, where the peft library changes both: export it merged"
        )
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
    _save(folder / "adapter_model.safetensors", tensors, trained)
    write_head(trained, folder)


def write_tensors(trained: Trained, folder: Path) -> None:
    """Writes the trained tensors and the method's constants under their own names."""
    _save(folder / "adapter.safetensors", trained.run.tensors, trained)


def write_head(trained: Trained, folder: Path) -> None:
    """Writes the linear head, if the task has one."""
    head = trained.model.module.head
    if head is not None:
        tensors = {name: p.detach() for name, p in head.named_parameters()}
        _save(folder / "head.safetensors", tensors, trained)


def _save(path: Path, tensors: Tensors, trained: Trained) -> None:
    metadata = {
        "format": "pt",
        "backbone": trained.backbone,
        "fingerprint": trained.model.fingerprint,
        "config_hash": trained.run.result["config_hash"],
    }
    save_file(tensors, path, metadata=metadata)
