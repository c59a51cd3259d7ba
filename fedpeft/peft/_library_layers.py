"""Three of the `peft` library's layers, without what `torch.func` cannot see through.

That is a hand-written gradient, chance, and sparse tensors. They compute the same and
are stored under the same names.
"""

import torch
import torch.nn.functional as F
from peft.tuners import lokr, randlora, shira
from torch import nn


class RandLoraLinear(randlora.Linear):  # type: ignore[misc]
    """Scales the random matrices by plain products."""

    def get_scaled_bases(
        self, adapter: str, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the two factors, in the order in which they apply."""
        gain, diagonal = self.randlora_lambda[adapter], self.randlora_gamma[adapter]
        small, large = sorted((self.in_features, self.out_features))
        down = self.randlora_A[adapter][:, : self.num_bases, :small]
        up = self.randlora_B[adapter][:large, : self.num_bases].flatten(1)
        scaled = (gain[:, :, None] * down * diagonal[None]).flatten(0, 1)
        return (scaled, up) if small == self.in_features else (up.t(), scaled.t())


class LoKrLinear(lokr.Linear):  # type: ignore[misc]
    """Never drops the module, which the library decides by a draw a step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds the product's output."""
        y: torch.Tensor = self.base_layer(x)
        for adapter in self.active_adapters:
            y = y + self._get_delta_activations(adapter, x).to(y.dtype)
        return y


class ShiraLinear(shira.Linear):  # type: ignore[misc]
    """Keeps the entries' places in the flattened weight, and any number of them."""

    places: torch.Tensor

    def set_entries(self, adapter: str, places: torch.Tensor) -> None:
        """Takes the entries to train, shape ``(entries,)``; they start at zero."""
        start = self.get_base_layer().weight.new_zeros(len(places))
        self.shira_weight[adapter] = nn.Parameter(start)
        indices = torch.stack((places // self.in_features, places % self.in_features))
        self.shira_indices[adapter] = indices.int()
        self.register_buffer("places", places, persistent=False)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Returns what is added to the weight, dense."""
        values = self.shira_weight[adapter]
        empty = values.new_zeros(self.out_features * self.in_features)
        changed: torch.Tensor = empty.scatter(0, self.places, values)
        return changed.view(self.out_features, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies by the changed weight, once."""
        base = self.get_base_layer()
        weight = base.weight
        for adapter in self.active_adapters:
            weight = weight + self.get_delta_weight(adapter)
        return F.linear(x, weight, base.bias)
