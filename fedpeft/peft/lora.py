"""Low-rank adaptation, by the `peft` library."""

from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft._layers import (
    ROLES,
    check_depth,
    check_first_layer,
    check_positive,
    freeze,
    model_type,
    names_ending,
    roles_of,
)

_ADAPTER = "default"


@dataclass(frozen=True)
class Lora(PeftMethod):
    """Adds ``(lora_alpha / rank) * B A x`` to chosen linear layers.

    Attributes:
        rank: of the product.
        lora_alpha: its scale; None means ``2 * rank``.
        rank_stabilized: divide `lora_alpha` by the rank's square root instead, so that
            the update keeps its size as the rank grows (rsLoRA, Kalajdzievski 2023).
        freeze_a: train B alone. The mean of the clients' products is then the product
            of the means, and noise enters linearly: the better choice under privacy
            (FFA-LoRA, Sun et al. 2024, section 3).
        target_modules: ends of the layers' names; None takes query and value, or the
            `peft` library's choice for an architecture that only it knows.
        first_layer: adapt only in this layer and above.

    Source: Hu et al. (2022), section 4.1. B starts at zero, A at Kaiming-uniform.
    """

    rank: int = 8
    lora_alpha: float | None = None
    rank_stabilized: bool = False
    freeze_a: bool = False
    target_modules: tuple[str, ...] | None = None
    first_layer: int = 0

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"Expected lora_alpha > 0, got {self.lora_alpha}.")
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Injects the adapters; B and (unless frozen) A are plain linear operations.

        Raises:
            ValueError: if no layer matches.
        """
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        # Whole names: the library finds no depth in a name that begins with "layers".
        ends = self.target_modules or _default_targets(backbone)
        names = names_ending(backbone, self.first_layer, ends)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.lora_alpha is None else self.lora_alpha,
            use_rslora=self.rank_stabilized,
            target_modules=names,
        )
        inject_adapter_in_model(config, backbone, _ADAPTER)
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


def _default_targets(backbone: nn.Module) -> tuple[str, ...]:
    kind = model_type(backbone)
    if kind not in ROLES:
        theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if isinstance(theirs, list):
            return tuple(theirs)
    roles = roles_of(backbone, "set target_modules")
    return roles.query, roles.value
