"""Small real models and comparisons that several tests share."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

from fedpeft.config import RunConfig
from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.oracle import relative_error
from fedpeft.tasks import ImageClassifier, TextClassifier

VOCABULARY = 64

SMALL = """
[run]
rounds = 3
workers = 0
[data]
path = "{path}"
text = "review"
label = "verdict"
labels = ["rotten", "fresh"]
group = "film"
nominal_examples = 48
test_fraction = 0.2
max_length = 32
[partition]
name = "by-group"
num_clients = 4
[model]
backbone = "minilm"
[peft]
name = "lora"
rank = 2
first_layer = 5
[training]
optimizer = "sgd"
learning_rate = 0.1
batch_size = 24
[cohort]
size = 2
[privacy]
noise = "seeded"
[compression]
name = "ternary"
density = 0.2
error_feedback = true
"""


def small_config(path: Path, *overrides: str) -> RunConfig:
    """A run of seconds: 4 clients, 3 rounds, the real MiniLM, a csv of real reviews."""
    return RunConfig.from_toml(SMALL.format(path=path), overrides)


def tiny_bert(dropout: float = 0.0) -> BertModel:
    """A BERT of 2 layers and 32 features, frozen, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        backbone = BertModel(config, add_pooling_layer=False)
    backbone.requires_grad_(False)
    return backbone


def tiny_vit(dropout: float = 0.0) -> ViTModel:
    """A ViT of 2 layers and 32 features for images of 16 patches, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        backbone = ViTModel(config, add_pooling_layer=False)
    return backbone.requires_grad_(False)


def tiny_llama(dropout: float = 0.0, attention_bias: bool = True) -> LlamaModel:
    """A Llama of 2 layers, 32 features and 2 key-value heads for 4 heads, frozen.

    Its attention has biases as Qwen2's has; its feed-forward block has none.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            attention_bias=attention_bias,
            attention_dropout=dropout,
        )
        backbone = LlamaModel(config)
    return backbone.requires_grad_(False)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "bert": tiny_bert,
    "vit": tiny_vit,
    "llama": tiny_llama,
}


@dataclass
class Toy:
    """A classifier with a method attached, and an untouched copy of it."""

    model: TextClassifier | ImageClassifier
    operations: list[Operation]
    plain: TextClassifier | ImageClassifier

    @property
    def plain_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.plain.parameters() if p.requires_grad]


def toy(
    method: PeftMethod, dropout: float = 0.0, noise: float = 0.1, family: str = "bert"
) -> Toy:
    """Attaches a method to a tiny backbone and leaves the identity by `noise`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        backbone = FAMILIES[family](dropout)
        operations = method.attach(backbone)
        classifier = ImageClassifier if family == "vit" else TextClassifier
        model = classifier(backbone, 32, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(noise * torch.randn_like(parameter))
    plain = copy.deepcopy(model)
    return Toy(model, [*operations, *model.head_operations], plain)


def toy_batch(batch: int, tokens: int = 7) -> tuple[torch.Tensor, ...]:
    """Ids, a ragged mask and labels of 3 classes."""
    rng = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=rng)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=rng)
    mask = (torch.arange(tokens) < lengths).long()
    return ids, mask, torch.randint(0, 3, (batch,), generator=rng)


def toy_images(batch: int) -> tuple[torch.Tensor, ...]:
    """Images of 32 x 32 and labels of 3 classes."""
    rng = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, 32, 32, generator=rng)
    return images, torch.randint(0, 3, (batch,), generator=rng)


def toy_inputs(family: str, batch: int) -> dict[str, torch.Tensor]:
    """What a family's backbone takes."""
    if family == "vit":
        return {"pixel_values": toy_images(batch)[0]}
    ids, mask, _ = toy_batch(batch)
    return {"input_ids": ids, "attention_mask": mask}


def toy_losses(model: nn.Module, batch: int, part: slice = slice(None)) -> torch.Tensor:
    """One loss an example of a part of the batch."""
    whole = toy_images if isinstance(model, ImageClassifier) else toy_batch
    *inputs, labels = (tensor[part] for tensor in whole(batch))
    return F.cross_entropy(model(*inputs), labels, reduction="none")


def assert_rows_close(
    rows: torch.Tensor, expected: torch.Tensor, parameters: list[nn.Parameter]
) -> None:
    """Equal within 1e-5, all together and each parameter alone.

    A parameter's share of the gradient may be nothing but rounding (the bias of a key
    is one such), hence the second term.
    """
    assert relative_error(rows, expected) < 1e-5
    sizes = [parameter.numel() for parameter in parameters]
    floor = 1e-6 * expected.norm()
    parts = zip(rows.split(sizes, 1), expected.split(sizes, 1), strict=True)
    for actual, wanted in parts:
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm() + floor
