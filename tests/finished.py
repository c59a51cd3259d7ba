"""Tiny backbones of three kinds in directories, and runs that end without training."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedpeft.config import RunConfig
from fedpeft.model import TaskModel, shared_state
from server.app import _write_model, begin
from server.result import build_result
from server.rundir import resolve
from server.setup import Server, open_server
from tests.helpers import tiny_vit

RUN = """
[run]
rounds = 1
workers = 0
[data]
{data}
test_fraction = 0.3
max_length = 16
nominal_examples = 4
[partition]
name = "iid"
num_clients = 2
[model]
backbone = "{backbone}"
task = "{task}"
[peft]
name = "head"
[training]
learning_rate = 0.1
batch_size = 4
[cohort]
size = 2
[privacy]
unit = "none"
"""
LABELS = 'labels = ["red", "blue"]'
TASKS = ("text-classification", "image-classification", "causal-lm")
SENTENCES = ("once upon a time there was a king", "a text is somewhat longer than one")
CHAT = "{% for turn in messages %}{{ turn['content'] }} </s> {% endfor %}"
RECORD = {
    "metric": 0.75,
    "others": {"macro_f1": 0.5},
    "replies": 2,
    "bytes_up": 8,
    "bytes_down": 8,
    "entropy_bytes": 8,
    "seconds": 1.0,
}


def tiny_directory(folder: Path, kind: str, minilm: Path, seed: int = 0) -> Path:
    """Saves a tiny backbone, ``bert``, ``vit``, ``dinov2``, ``llama`` or ``chat``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _save(folder, kind, minilm)
    return folder


def _save(folder: Path, kind: str, minilm: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    if kind == "bert":
        tokenizer = AutoTokenizer.from_pretrained(minilm)
        tokenizer.save_pretrained(folder)
        BertModel(BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(
            folder
        )
    elif kind == "vit":
        tiny_vit().save_pretrained(folder)
    elif kind == "dinov2":
        config = Dinov2Config(**sizes, mlp_ratio=2, image_size=32, patch_size=8)
        Dinov2Model(config).save_pretrained(folder)
    else:
        tokenizer = _words()
        tokenizer.chat_template = CHAT if kind == "chat" else None
        tokenizer.save_pretrained(folder)
        # Input and output share one table, as they do in small chat models.
        config = LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)


def _words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator([s.capitalize() for s in SENTENCES], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    )


def tiny_data(folder: Path, task: str) -> str:
    """Writes a dozen examples; returns the lines of ``[data]`` that name them."""
    if task == "image-classification":
        rng = np.random.default_rng(0)
        for number in range(12):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            path = folder / "images" / ("red", "blue")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        return f'path = "{folder / "images"}"\n{LABELS}'
    rows = [
        {"text": f"{SENTENCES[n % 2]} {n}", "label": ("red", "blue")[n % 2]}
        if task == "text-classification"
        else {"prompt": SENTENCES[n % 2], "completion": "a king"}
        for n in range(12)
    ]
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    end = LABELS if task == "text-classification" else 'completion = "completion"'
    return f'path = "{path}"\n{end}'


def tiny_config(
    folder: Path, task: str, backbone: object, *overrides: str
) -> RunConfig:
    """A run on a dozen examples, which are written into the folder."""
    data = tiny_data(folder, task)
    text = RUN.format(data=data, backbone=backbone, task=task)
    return RunConfig.from_toml(text, overrides)


def finish(config: RunConfig, output: Path, distance: float = 0.1) -> TaskModel:
    """Writes the directory of a run whose values moved by chance, not by training."""
    output.mkdir(parents=True)
    server = open_server(resolve(config, output, resume=False), output)
    progress = begin(server, resume=False)
    _move(server, distance)
    progress.tail = progress.trainable = shared_state(server.model)
    progress.server_round, progress.records = 1, [RECORD]
    _write_model(server, progress)
    result = build_result(server, progress, seconds=1.0, spent=None, memory=1)
    (output / "result.json").write_text(json.dumps(result))
    return server.model


def _move(server: Server, distance: float) -> None:
    rng = torch.Generator().manual_seed(1)
    module: nn.Module = server.model.module.eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in server.model.local_start:
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.add_(distance * noise)
