"""The lines of Python that use an export, without fedpeft."""

from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

from fedpeft.export.stored import Trained
from fedpeft.tasks import CausalLM, Dinov2Classifier, ImageClassification

_HEAD = 'head = load_file(f"{FOLDER}/head.safetensors")'


def snippet(trained: Trained, format: str) -> str:
    """Returns a program that loads the directory and computes logits.

    Of tensors that belong to layers which the method added, it only lists them.
    """
    if format == "safetensors" and not fits_the_plain_backbone(trained):
        return _LISTING
    task = trained.run.config.model.task
    kind = "AutoModelForCausalLM" if task == "causal-lm" else "AutoModel"
    if task == "image-classification" and format == "merged":
        kind = "AutoModelForImageClassification"
    uses: dict[str, Any] = {
        "text-classification": _use_texts,
        "image-classification": _use_images,
        "causal-lm": _use_prompt,
    }
    lines = [*_load(trained, format, kind), "", *uses[task](trained, format)]
    return "\n".join([*_imports(lines), "", *_places(trained, format), *lines]) + "\n"


def _imports(lines: list[str]) -> list[str]:
    """Returns the imports that a program needs."""
    code = "\n".join(lines)
    known = {
        "import numpy": "numpy.",
        "import torch": "torch.",
        "import torch.nn.functional as F": "F.",
        "from peft import PeftModel": "PeftModel",
        "from PIL import Image": "Image.open",
        "from safetensors.torch import load_file": "load_file",
    }
    autos = [
        name
        for name in (
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForImageClassification",
            "AutoTokenizer",
        )
        if f"{name}." in code
    ]
    found = [line for line, sign in known.items() if sign in code]
    return [*found, f"from transformers import {', '.join(autos)}"]


def _places(trained: Trained, format: str) -> list[str]:
    lines = ['FOLDER = "."  # where these files lie']
    if format != "merged":
        name = ascii(trained.backbone)
        lines.append(f"BACKBONE = {name}  # a directory, or a name that a hub knows")
    return lines


def _load(trained: Trained, format: str, kind: str) -> list[str]:
    task = trained.run.config.model.task
    source = "FOLDER" if format == "merged" else "BACKBONE"
    lines = [f"model = {kind}.from_pretrained({source})"]
    if kind == "AutoModel" and hasattr(trained.model.module.backbone, "pooler"):
        lines[0] += "  # a pooler is not used: it may be missing"
    if format == "peft":
        lines.append("model = PeftModel.from_pretrained(model, FOLDER)")
    if format == "safetensors":
        lines += _load_plain(task)
    elif task == "text-classification" or (format == "peft" and task != "causal-lm"):
        lines.append(_HEAD)
    lines.append("model.eval()")
    if task != "image-classification":
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({source})")
    return lines


def _load_plain(task: str) -> list[str]:
    """Puts tensors of the backbone's own names into it."""
    body = "model.base_model" if task == "causal-lm" else "model"
    lines = [
        'tensors = load_file(f"{FOLDER}/adapter.safetensors")',
        'own = {name[9:]: t for name, t in tensors.items() if name[:9] == "backbone."}',
        f"assert not {body}.load_state_dict(own, strict=False).unexpected_keys",
    ]
    if task != "causal-lm":
        lines.append(
            'head = {key: tensors[f"head.{key}"] for key in ("weight", "bias")}'
        )
    return lines


def _use_texts(trained: Trained, format: str) -> list[str]:
    task: Any = trained.model.task
    lines = ['texts = ["A first text.", "Another one, which is somewhat longer."]']
    if task.tokenizer.pad_token is None:
        lines.append("tokenizer.pad_token = tokenizer.eos_token")
    return [
        *lines,
        "inputs = tokenizer(",
        '    texts, padding=True, padding_side="right", truncation=True,',
        f'    max_length={task.max_length}, return_tensors="pt",',
        ")",
        'ids, mask = inputs["input_ids"], inputs["attention_mask"]',
        "with torch.no_grad():",
        "    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state",
        "weights = mask.unsqueeze(2).to(hidden.dtype)",
        "features = (hidden * weights).sum(1) / weights.sum(1)  # the mean over tokens",
        'logits = features @ head["weight"].T + head["bias"]',
        *_print_classes(trained),
    ]


def _use_images(trained: Trained, format: str) -> list[str]:
    task = trained.model.task
    assert isinstance(task, ImageClassification)
    size = (task.image_size, task.image_size)
    lines = [
        'image = numpy.array(Image.open("image.png").convert("RGB"))',
        "pixels = torch.tensor(image).movedim(2, 0).unsqueeze(0).float()",
        f'pixels = F.interpolate(pixels, {size}, mode="bilinear", antialias=True)',
        f"mean = torch.tensor({list(task.mean)}).view(3, 1, 1)",
        f"deviation = torch.tensor({list(task.deviation)}).view(3, 1, 1)",
        "pixels = (pixels.round().clamp(0, 255) / 255 - mean) / deviation",
        "with torch.no_grad():",
    ]
    if format == "merged":
        lines.append("    logits = model(pixel_values=pixels).logits")
    else:
        lines.append("    hidden = model(pixel_values=pixels).last_hidden_state")
        lines.append("features = hidden[:, 0]  # of the class token")
        if isinstance(trained.model.module, Dinov2Classifier):
            both = "(features, hidden[:, 1:].mean(1))"
            lines.append(f"features = torch.cat({both}, 1)  # and the patches' mean")
        lines.append('logits = features @ head["weight"].T + head["bias"]')
    return [*lines, *_print_classes(trained)]


def _use_prompt(trained: Trained, format: str) -> list[str]:
    task: Any = trained.model.task
    lines = ['prompt = "Once upon a time"']
    if task.tokenizer.chat_template:
        lines += [
            "inputs = tokenizer.apply_chat_template(",
            '    [{"role": "user", "content": prompt}], add_generation_prompt=True,',
            '    return_dict=True, return_tensors="pt",',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer(prompt, return_tensors="pt")')
    return [
        *lines,
        'inputs.pop("token_type_ids", None)',
        "with torch.no_grad():",
        "    logits = model(**inputs).logits",
        "    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)",
        'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))',
    ]


def _print_classes(trained: Trained) -> list[str]:
    data = trained.run.config.data
    share = "logits.sigmoid()" if data.multi_label else "logits.softmax(1)"
    if data.labels is None:
        return [f"print({share})"]
    return [f"CLASSES = {list(data.labels)!a}", f"print(CLASSES, {share})"]


def fits_the_plain_backbone(trained: Trained) -> bool:
    """Whether all that was trained has a name in the plain backbone, or is the head."""
    module: Any = trained.model.module
    kind = AutoModelForCausalLM if isinstance(module, CausalLM) else AutoModel
    with torch.device("meta"):
        plain = kind.from_config(module.backbone.config)
    known = {f"backbone.{name}" for name in plain.base_model.state_dict()}
    return trained.run.tensors.keys() <= known | {"head.weight", "head.bias"}


_LISTING = """\
from safetensors import safe_open

FOLDER = "."  # where these files lie
with safe_open(f"{FOLDER}/adapter.safetensors", "pt") as file:
    print(file.metadata())
    tensors = {name: file.get_tensor(name) for name in file.keys()}
for name, tensor in tensors.items():
    print(name, tuple(tensor.shape))
"""
