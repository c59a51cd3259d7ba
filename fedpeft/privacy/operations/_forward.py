"""The type that all rules share."""

from collections.abc import Callable
from typing import TypeAlias

import torch

Forward: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""A module's forward pass, with a tap on its output."""
