"""Attacks: what an adversary does with an observation. One a file; this is the menu."""

from typing import Any

from fedpeft.attacks.attack import Attack

ATTACKS: dict[str, type[Attack[Any]]] = {}
"""id -> class, a frozen dataclass of hyperparameters."""
