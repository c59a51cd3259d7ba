"""Small real models and comparisons that several tests share."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel

from fedpeft.backbone import TextClassifier
from fedpeft.config import RunConfig
from fedpeft.interfaces import Operation, PeftMethod

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


@dataclass
class Toy:
    """A classifier with a method attached, and an untouched copy of it."""

    model: TextClassifier
    operations: list[Operation]
    plain: TextClassifier

    @property
    def plain_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.plain.parameters() if p.requires_grad]


def toy(method: PeftMethod, dropout: float = 0.0, noise: float = 0.1) -> Toy:
    """Attaches a method to the tiny BERT and leaves the identity by `noise`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        backbone = tiny_bert(dropout)
        operations = method.attach(backbone)
        model = TextClassifier(backbone, 32, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(noise * torch.randn_like(parameter))
    plain = copy.deepcopy(model)
    return Toy(model, [*operations, model.head_operation], plain)


def toy_batch(batch: int, tokens: int = 7) -> tuple[torch.Tensor, ...]:
    """Ids, a ragged mask and labels of 3 classes."""
    rng = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, VOCABULARY, (batch, tokens), generator=rng)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=rng)
    mask = (torch.arange(tokens) < lengths).long()
    return ids, mask, torch.randint(0, 3, (batch,), generator=rng)


def toy_losses(model: nn.Module, batch: int, part: slice = slice(None)) -> torch.Tensor:
    """One loss an example of a part of the batch."""
    ids, mask, labels = (tensor[part] for tensor in toy_batch(batch))
    return F.cross_entropy(model(ids, mask), labels, reduction="none")
