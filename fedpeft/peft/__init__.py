"""PEFT methods by name: the menu of ``[peft] name``."""

from fedpeft.interfaces import PeftMethod
from fedpeft.peft.bias import Bias
from fedpeft.peft.head import Head
from fedpeft.peft.lora import Lora
from fedpeft.peft.ssf import SSF, ScaleShift

METHODS: dict[str, type[PeftMethod]] = {
    "head": Head,
    "bias": Bias,
    "lora": Lora,
    "ssf": SSF,
}

__all__ = ["METHODS", "SSF", "Bias", "Head", "Lora", "ScaleShift"]
