"""Low-rank adaptation, by the `peft` library."""

from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import check_depth, check_first_layer, freeze, layer_of

_ADAPTER = "default"


@dataclass(frozen=True)
class Lora(PeftMethod):
    """Adds ``(lora_alpha / rank) * B A x`` to chosen linear layers.

    Attributes:
        rank: of the product.
        lora_alpha: its scale; None means ``2 * rank``.
        freeze_a: train B alone. The mean of the clients' products is then the product
            of the means, and noise enters linearly: the better choice under privacy
            (FFA-LoRA, Sun et al. 2024, section 3).
        target_modules: ends of the layers' names; None takes the `peft` library's
            choice for the architecture (query and value for BERT).
        first_layer: adapt only in this layer and above.

    Source: Hu et al. (2022), section 4.1. B starts at zero, A at Kaiming-uniform.
    """

    rank: int = 8
    lora_alpha: float | None = None
    freeze_a: bool = False
    target_modules: tuple[str, ...] | None = None
    first_layer: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"Expected rank >= 1, got {self.rank}.")
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Injects the adapters; B and (unless frozen) A are plain linear operations.

        Raises:
            ValueError: if no layer matches.
        """
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        inject_adapter_in_model(self._config(backbone), backbone, _ADAPTER)
        operations = []
        for module in backbone.modules():
            if isinstance(module, LoraLayer):
                if not isinstance(module, Linear):
                    raise ValueError(
                        "Expected target_modules that are linear layers, got "
                        f"{type(module.get_base_layer()).__name__}."
                    )
                down, up = module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]
                down.weight.requires_grad_(not self.freeze_a)
                for linear in (up,) if self.freeze_a else (down, up):
                    parameters = {"weight": linear.weight}
                    operations.append(Operation(linear, "linear", parameters))
        return operations

    def _config(self, backbone: nn.Module) -> LoraConfig:
        depths = {layer_of(name) for name, _ in backbone.named_modules()} - {None}
        layers = [d for d in depths if d is not None and d >= self.first_layer]
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.lora_alpha is None else self.lora_alpha,
            target_modules=list(self.target_modules) if self.target_modules else None,
            layers_to_transform=layers if self.first_layer else None,
        )
