"""PEFT methods by name: the menu of ``[peft] name``."""

from fedpeft.interfaces import PeftMethod
from fedpeft.peft.bias import Bias
from fedpeft.peft.bottleneck import Bottleneck
from fedpeft.peft.film import Film
from fedpeft.peft.head import Head
from fedpeft.peft.ia3 import IA3
from fedpeft.peft.lora import Lora
from fedpeft.peft.prefix import Prefix
from fedpeft.peft.prompt import Prompt
from fedpeft.peft.ssf import SSF, ScaleShift
from fedpeft.peft.token_rows import TokenRows

METHODS: dict[str, type[PeftMethod]] = {
    "head": Head,
    "bias": Bias,
    "film": Film,
    "ssf": SSF,
    "ia3": IA3,
    "lora": Lora,
    "bottleneck": Bottleneck,
    "prompt": Prompt,
    "prefix": Prefix,
    "token_rows": TokenRows,
}

__all__ = [
    "IA3",
    "METHODS",
    "SSF",
    "Bias",
    "Bottleneck",
    "Film",
    "Head",
    "Lora",
    "Prefix",
    "Prompt",
    "ScaleShift",
    "TokenRows",
]
