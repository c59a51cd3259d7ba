"""PEFT methods by name: the menu of ``[peft] name``."""

from fedpeft.interfaces import PeftMethod
from fedpeft.peft.bias import Bias
from fedpeft.peft.bottleneck import Bottleneck
from fedpeft.peft.fedsb import FedSB
from fedpeft.peft.film import Film
from fedpeft.peft.full import Full
from fedpeft.peft.head import Head
from fedpeft.peft.ia3 import IA3
from fedpeft.peft.library import AdaLora, LoKr, Lora, RandLora, Shira, Vera
from fedpeft.peft.mask import Mask
from fedpeft.peft.nola import Nola
from fedpeft.peft.onebit import OneBit
from fedpeft.peft.prefix import Prefix
from fedpeft.peft.prompt import Prompt
from fedpeft.peft.side import Side
from fedpeft.peft.ssf import SSF, ScaleShift
from fedpeft.peft.ssf_pool import SSFPool
from fedpeft.peft.token_rows import TokenRows

METHODS: dict[str, type[PeftMethod]] = {
    "head": Head,
    "full": Full,
    "bias": Bias,
    "film": Film,
    "ssf": SSF,
    "ssf_pool": SSFPool,
    "ia3": IA3,
    "lora": Lora,
    "adalora": AdaLora,
    "vera": Vera,
    "randlora": RandLora,
    "lokr": LoKr,
    "shira": Shira,
    "nola": Nola,
    "onebit": OneBit,
    "fedsb": FedSB,
    "mask": Mask,
    "bottleneck": Bottleneck,
    "side": Side,
    "prompt": Prompt,
    "prefix": Prefix,
    "token_rows": TokenRows,
}

__all__ = [
    "IA3",
    "METHODS",
    "SSF",
    "AdaLora",
    "Bias",
    "Bottleneck",
    "FedSB",
    "Film",
    "Full",
    "Head",
    "LoKr",
    "Lora",
    "Mask",
    "Nola",
    "OneBit",
    "Prefix",
    "Prompt",
    "RandLora",
    "SSFPool",
    "ScaleShift",
    "Shira",
    "Side",
    "TokenRows",
    "Vera",
]
