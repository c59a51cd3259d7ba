"""The models of the benchmarks: shapes of common backbones, random weights."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft import METHODS

PEFT_METHODS: dict[str, PeftMethod] = {
    "lora": METHODS["lora"](),
    "ssf": METHODS["ssf"](),
    "bias": METHODS["bias"](),
    "film": METHODS["film"](),
    "adapter": METHODS["bottleneck"](),
    "head": METHODS["head"](),
}


@dataclass(frozen=True)
class Shape:
    """A backbone's configuration and a batch that it sees.

    Attributes:
        config: of `transformers`, without dropout.
        batch: number of examples.
        tokens: a text's length; None for images.
        labels: number of classes.
    """

    config: BertConfig | ViTConfig
    batch: int
    tokens: int | None
    labels: int

    def backbone(self, attention: str) -> nn.Module:
        """Builds it with random weights."""
        build = ViTModel if self.tokens is None else BertModel
        self.config._attn_implementation = attention
        backbone: nn.Module = build(self.config, add_pooling_layer=False)
        return backbone

    def inputs(self, batch: int) -> torch.Tensor:
        """Draws ids ``(batch, tokens)`` or pixels ``(batch, 3, height, width)``."""
        if self.tokens is not None:
            return torch.randint(self.config.vocab_size, (batch, self.tokens))
        size = self.config.image_size
        return torch.randn(batch, self.config.num_channels, size, size)


def _bert(hidden: int, layers: int, heads: int, words: int = 30522) -> BertConfig:
    return BertConfig(
        vocab_size=words,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _vit(hidden: int, layers: int, heads: int, size: int = 224) -> ViTConfig:
    return ViTConfig(
        image_size=size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )


SHAPES = {
    "vit_ti": Shape(_vit(192, 12, 3), batch=8, tokens=None, labels=100),
    "bert": Shape(_bert(384, 6, 12), batch=8, tokens=128, labels=4),
    "bert_small": Shape(_bert(128, 4, 4), batch=16, tokens=32, labels=4),
}

TINY_IMAGES = Shape(_vit(16, 1, 2, size=32), batch=2, tokens=None, labels=3)
TINY_TEXTS = Shape(_bert(16, 1, 2, words=64), batch=2, tokens=5, labels=3)
"""The same architectures in next to no time."""


class Classifier(nn.Module):
    """Backbone, mean over its output's positions, linear head."""

    def __init__(self, backbone: nn.Module, features: int, labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps a batch to logits ``(batch, labels)``."""
        hidden = self.backbone(x).last_hidden_state
        logits: torch.Tensor = self.head(hidden.mean(1))
        return logits


@dataclass(frozen=True)
class Case:
    """A model with a method attached, and a batch for it."""

    model: nn.Module
    operations: list[Operation]
    inputs: torch.Tensor
    labels: torch.Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]


def make_case(
    shape: Shape, method: PeftMethod, device: str, batch: int | None = None
) -> Case:
    """Builds a case; two with the same arguments are equal.

    The trainable parameters have left the identity, where some gradients are zero.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # As ``fedpeft.backbone`` chooses it.
        attention = "eager" if device == "cpu" else "sdpa"
        backbone = shape.backbone(attention)
        operations = method.attach(backbone)
        model = Classifier(backbone, shape.config.hidden_size, shape.labels)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        inputs = shape.inputs(batch or shape.batch)
        labels = torch.randint(shape.labels, (len(inputs),))
    head = Operation(model.head, "linear", dict(model.head.named_parameters()))
    return Case(
        model.to(device).train(),
        [*operations, head],
        inputs.to(device),
        labels.to(device),
    )
