"""The bytes of a round, on the shape of ViT-B with 100 classes.

Expected: Sun et al. (2022), FedPEFT, table 1, in MiB of single precision, the head's
76,900 values included in every row.
"""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from fedpeft.interfaces import PeftMethod
from fedpeft.peft import Bias, Bottleneck, Full, Head, Prompt

HEAD = 768 * 100 + 100


def _vit_b() -> nn.Module:
    with torch.device("meta"):  # shapes alone
        return ViTModel(ViTConfig(), add_pooling_layer=False)


def _trained(method: PeftMethod) -> int:
    backbone = _vit_b()
    method.attach(backbone)
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "values", "mebibytes"),
    [
        (Head(), 76_900, 0.29),
        (Bias(), 179_044, 0.686),  # theirs with the patches' 768
        (Bottleneck(width=8), 233_668, 0.89),
        (Prompt(length=10, deep=True), 169_060, 0.645),
        (Full(), 85_132_900, 328),  # theirs with the embeddings: 0.9 % more
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PeftMethod) else None,
)
def test_bytes_a_round_are_those_of_the_paper(method, values, mebibytes) -> None:
    assert _trained(method) + HEAD == values
    # Within 1 %, or within the rounding of two digits.
    assert 4 * values / 2**20 == pytest.approx(mebibytes, rel=0.01, abs=0.005)


def test_full_leaves_the_embeddings_alone() -> None:
    # The class token, 197 positions, patches of 16 x 16 x 3 and their bias.
    embeddings = 768 * (1 + 197 + 16 * 16 * 3 + 1)
    whole = sum(p.numel() for p in _vit_b().parameters())
    assert _trained(Full()) == whole - embeddings


def test_a_deep_prompt_has_its_tokens_in_every_layer() -> None:
    assert _trained(Prompt(length=10, deep=True)) == 12 * 10 * 768
    assert _trained(Prompt(length=10)) == 10 * 768
