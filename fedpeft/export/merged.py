"""The format that needs nothing else: a whole model for `transformers`."""

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GenerationConfig,
)

from fedpeft.errors import RunError
from fedpeft.export.adapter import write_head
from fedpeft.export.stored import Trained
from fedpeft.tasks import CausalLM, ImageClassification, ImageClassifier
from fedpeft.tensors import Tensors

_TOLERANCE = 1e-3
"""Of the largest logit: rounding of the merge is far below, another formula above."""


def write_merged(trained: Trained, folder: Path) -> None:
    """Writes model, and tokenizer or preprocessor, as `transformers` loads them.

    **Guarantees**: on a drawn input it computes the logits of the trained model.

    Raises:
        ValueError: if the method does not merge, or `transformers` has no such model.
        RunError: if the logits are others.
    """
    module: Any = trained.model.module
    shell = _shell(trained)
    inputs = _drawn_inputs(trained)
    before = _logits(module, inputs)
    trained.method.merge(module.backbone)
    whole = module.backbone if shell is None else _fill(shell, module)
    after = _logits(module if shell is None else whole, inputs)
    error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-6))
    if not error < _TOLERANCE:
        raise RunError(
            f"Expected a merged model with the same logits, got some that are off by "
            f"{error:.1e}: export the safetensors."
        )
    whole.save_pretrained(folder)
    if shell is None:
        write_head(trained, folder)
    task: Any = trained.model.task
    if isinstance(task, ImageClassification):
        settings = json.dumps(_preprocessor(task), indent=2)
        (folder / "preprocessor_config.json").write_text(settings + "\n")
    else:
        task.tokenizer.save_pretrained(folder)


def _shell(trained: Trained) -> Any:
    """Returns a model of `transformers` without values, to put the layers into.

    None for texts, for which there is none with a mean over tokens.
    """
    module: Any = trained.model.module
    config = copy.deepcopy(module.backbone.config)
    if isinstance(module, ImageClassifier):
        _name_classes(config, trained)
        kind: Any = AutoModelForImageClassification
    elif isinstance(module, CausalLM):
        kind = AutoModelForCausalLM
    else:
        return None
    with torch.device("meta"):
        return kind.from_config(config).eval()


def _fill(shell: Any, module: Any) -> Any:
    """Puts the backbone and the last layer into the shell."""
    backbone = module.backbone
    setattr(shell, shell.base_model_prefix, backbone)
    if isinstance(module, ImageClassifier):
        shell.classifier = module.head
        return shell
    table = backbone.get_input_embeddings()
    shell.config.tie_word_embeddings = table.weight is module.output.weight
    shell.set_output_embeddings(module.output)
    with suppress(OSError):  # the backbone may bring no such settings
        settings = GenerationConfig.from_pretrained(backbone.name_or_path)
        shell.generation_config = settings
    return shell


def _name_classes(config: Any, trained: Trained) -> None:
    data, number = trained.run.config.data, trained.run.num_labels
    labels = data.labels or [f"LABEL_{position}" for position in range(number)]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: position for position, label in enumerate(labels)}
    several = "multi_label_classification"
    config.problem_type = several if data.multi_label else "single_label_classification"


@torch.inference_mode()
def _logits(model: Any, inputs: Tensors) -> torch.Tensor:
    output = model(**inputs)
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


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
