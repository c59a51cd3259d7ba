"""Every method that comes by the `peft` library: wrapped once, configured six times.

The library puts its layers around linear ones. A plain LoRA layer is two linear
operations in a row; every other layer is one operation of kind ``module``.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    AdaLoraConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    RandLoraConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.interfaces import Operation, PeftAdapter, PeftMethod
from fedpeft.peft._layers import (
    check_above_zero,
    check_depth,
    check_first_layer,
    check_positive,
    default_targets,
    freeze,
    names_ending,
)
from fedpeft.peft._library_layers import LoKrLinear, RandLoraLinear, ShiraLinear
from fedpeft.tensors import Tensors

_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class _Library(PeftMethod):
    """What all of them share.

    Attributes:
        target_modules: ends of the layers' names; None takes query and value, or the
            `peft` library's choice for an architecture that only it knows.
        first_layer: adapt only in this layer and above.
    """

    target_modules: tuple[str, ...] | None = None
    first_layer: int = 0

    @abstractmethod
    def _config(self, names: list[str]) -> PeftConfig:
        """Returns the library's configuration for layers of these names."""

    def _check_layer(self, name: str, smallest: int) -> None:
        """Refuses a layer that is too small."""

    def _prepare(self, layer: Any) -> None:
        """Changes an injected layer where the library's own will not do."""

    def _operations(self, layer: Any) -> list[Operation]:
        """Names how an injected layer's parameters act."""
        return [Operation(layer, "module", _trainable(layer))]

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Injects the adapters.

        Raises:
            ValueError: if no layer matches, or one that cannot take the adapter.
        """
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        # Whole names: the library finds no depth in a name that begins with "layers".
        ends = self.target_modules or default_targets(backbone)
        names = names_ending(backbone, self.first_layer, ends)
        for name in names:
            target = backbone.get_submodule(name)
            if not isinstance(target, nn.Linear | Conv1D):
                raise ValueError(
                    f"Expected target_modules that are linear layers, got "
                    f"{type(target).__name__}."
                )
            self._check_layer(name, min(target.weight.shape))
        config = self._config(names)
        # What `inject_adapter_in_model` does, which refuses VeRA: there the matrices
        # hang on the tuner. They hang on each layer as well.
        PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](backbone, config, _ADAPTER)
        operations = []
        for _, layer in _injected(backbone):
            self._prepare(layer)
            operations += self._operations(layer)
        return operations

    def merge(self, backbone: nn.Module) -> None:
        """Adds the products to the frozen weights and takes the adapters out."""
        model: Any = backbone
        for name, layer in list(_injected(backbone)):
            layer.merge()
            backbone.set_submodule(name, layer.get_base_layer())
        del model.peft_config

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns what `PeftModel.from_pretrained` loads on the plain backbone."""
        model: Any = backbone
        stored = get_peft_model_state_dict(backbone, adapter_name=_ADAPTER)
        return library_adapter(model.peft_config[_ADAPTER], stored)


@dataclass(frozen=True)
class Lora(_Library):
    """Adds ``(lora_alpha / rank) * B A x`` to chosen linear layers.

    Attributes:
        rank: of the product.
        lora_alpha: its scale; None means ``2 * rank``.
        rank_stabilized: divide `lora_alpha` by the rank's square root instead, so that
            the update keeps its size as the rank grows (rsLoRA, Kalajdzievski 2023).
        freeze_a: train B alone. The mean of the clients' products is then the product
            of the means, and noise enters linearly: the better choice under privacy
            (FFA-LoRA, Sun et al. 2024, section 3).
        init: ``pissa`` starts with the weight's own principal part and freezes the rest
            of it, so the backbone's output is kept up to rounding (Meng et al. 2024,
            section 3). By the exact decomposition, which draws nothing, with signs
            made unique: all clients start alike, up to rounding.
        dora: also train the length of each row of the adapted weight (Liu et al. 2024,
            DoRA, section 4; the length it is divided by counts as constant, 4.3).

    Source: Hu et al. (2022), section 4.1. B starts at zero, A at Kaiming-uniform.
    """

    rank: int = 8
    lora_alpha: float | None = None
    rank_stabilized: bool = False
    freeze_a: bool = False
    init: Literal["default", "pissa"] = "default"
    dora: bool = False

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)
        check_above_zero(lora_alpha=self.lora_alpha)
        check_first_layer(self.first_layer)

    @property
    def starts_from_weights(self) -> bool:
        """Whether it begins with the weight's principal part, or its rows' lengths."""
        return self.init == "pissa" or self.dora

    def _check_layer(self, name: str, smallest: int) -> None:
        _check_rank("rank", self.rank, name, smallest)

    def _config(self, names: list[str]) -> PeftConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.lora_alpha is None else self.lora_alpha,
            use_rslora=self.rank_stabilized,
            init_lora_weights="pissa" if self.init == "pissa" else True,
            use_dora=self.dora,
            target_modules=names,
        )

    def _prepare(self, layer: Any) -> None:
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        down.requires_grad_(not self.freeze_a)
        if self.init == "pissa":
            signs = down.gather(1, down.abs().argmax(1, keepdim=True)).sign()
            down.data *= signs
            up.data *= signs.t()
            # What the frozen weight lacks: only with it can the adapter be exported.
            layer.register_buffer("start_A", down.data.clone(), persistent=False)
            layer.register_buffer("start_B", up.data.clone(), persistent=False)

    def _operations(self, layer: Any) -> list[Operation]:
        if self.dora:
            return super()._operations(layer)
        down, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        trained = (up,) if self.freeze_a else (down, up)
        return [Operation(part, "linear", {"weight": part.weight}) for part in trained]

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns the adapter; after ``pissa`` a plain one of twice the rank.

        It takes away what the weight had given: ``B A - B_0 A_0`` on the plain weight.
        """
        adapter = super().to_peft(backbone)
        if self.init != "pissa":
            return adapter
        tensors = dict(adapter.tensors)
        for name, layer in _injected(backbone):
            parts = (
                (f"{name}.lora_A.weight", layer.start_A, 0),
                (
                    f"{name}.lora_B.weight",
                    -layer.start_B,
                    1,
                ),
            )
            for key, start, side in parts:
                tensors[key] = torch.cat((tensors[key], start.cpu()), side)
        growth = math.sqrt(2) if self.rank_stabilized else 2  # keeps the scale
        alpha = float(str(adapter.config["lora_alpha"])) * growth
        changed = {"r": 2 * self.rank, "lora_alpha": alpha, "init_lora_weights": True}
        return PeftAdapter(adapter.config | changed, tensors)


@dataclass(frozen=True)
class AdaLora(_Library):
    """Adds ``(lora_alpha / initial_rank) * P E Q x`` with a diagonal E.

    Clients train all triplets (a column of P, a value of E, a row of Q). Which of them
    live is the server's decision, from aggregated steps alone: the aggregation's
    ``rank_allocation`` sets the E of the others to zero. They may revive: the gradient
    of an E that is zero is not.

    The source adds a penalty that keeps P and Q orthogonal. It is left out: it depends
    on no data, so it has no place in a gradient that is clipped by example.

    Attributes:
        initial_rank: of every product.
        target_rank: what the server comes down to on average, as the export tells it.
        lora_alpha: scale; None means ``2 * initial_rank``.

    Source: Zhang et al. (2023), AdaLoRA, section 3.1. E starts at zero.
    """

    initial_rank: int = 12
    target_rank: int = 8
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        check_positive(initial_rank=self.initial_rank, target_rank=self.target_rank)
        if self.target_rank > self.initial_rank:
            raise ValueError(
                f"Expected target_rank <= {self.initial_rank}, the initial_rank, got "
                f"{self.target_rank}."
            )
        check_above_zero(lora_alpha=self.lora_alpha)
        check_first_layer(self.first_layer)

    def _check_layer(self, name: str, smallest: int) -> None:
        _check_rank("initial_rank", self.initial_rank, name, smallest)

    def _config(self, names: list[str]) -> PeftConfig:
        rank, alpha = self.initial_rank, self.lora_alpha
        return AdaLoraConfig(
            init_r=rank,
            target_r=self.target_rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            total_step=1,  # the library's own schedule is never run
            target_modules=names,
        )


@dataclass(frozen=True)
class Vera(_Library):
    """Trains two vectors around random matrices that all layers and clients share.

    Adds ``b * B (d * A x)``. A and B come from the run's seed and never train.

    Attributes:
        rank: rows of A. It costs one trained value each: larger than LoRA's, and it may
            exceed the layer's size.
        d_initial: start of d; b starts at zero.

    Source: Kopiczko et al. (2024), VeRA, section 3.1.
    """

    rank: int = 256
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)
        check_first_layer(self.first_layer)

    def _config(self, names: list[str]) -> PeftConfig:
        config = VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            projection_prng_key=_drawn_key(),
            target_modules=names,
        )
        # Known by its key. The class warns of that where the field is given to it.
        config.save_projection = False
        return config


@dataclass(frozen=True)
class RandLora(_Library):
    """Adds a full-rank sum of random products, each scaled by trained diagonals.

    Attributes:
        rank: of each random product; the smaller, the more products and trained values.
        lora_alpha: scale, divided by `rank`; None means ``20 * rank``.

    Source: Albert et al. (2025), RandLoRA, section 4.
    """

    rank: int = 32
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)
        check_above_zero(lora_alpha=self.lora_alpha)
        check_first_layer(self.first_layer)

    def _config(self, names: list[str]) -> PeftConfig:
        config = RandLoraConfig(
            r=self.rank,
            randlora_alpha=20 * self.rank
            if self.lora_alpha is None
            else self.lora_alpha,
            projection_prng_key=_drawn_key(),
            target_modules=names,
        )
        config.save_projection = False
        return config

    def _prepare(self, layer: Any) -> None:
        layer.__class__ = RandLoraLinear
        drawn = layer.randlora_A[_ADAPTER]
        if not torch.equal(drawn, drawn.bfloat16().to(drawn.dtype)):
            raise ValueError(
                "Expected a machine with bfloat16, in which the random matrices are "
                "drawn, got one without: it would draw others; choose vera."
            )


@dataclass(frozen=True)
class LoKr(_Library):
    """Adds a Kronecker product, of which the larger factor is itself of low rank.

    Attributes:
        rank: of the larger factor, which is whole where that is no larger.
        lora_alpha: scale, divided by `rank`; None means `rank`.
        factor: size of the smaller factor; -1 takes the two as alike as they can be.

    Source: Yeh et al. (2024), LyCORIS, section 3.2, LoKr.
    """

    rank: int = 8
    lora_alpha: float | None = None
    factor: int = -1

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)
        check_above_zero(lora_alpha=self.lora_alpha)
        if self.factor != -1:
            check_positive(factor=self.factor)
        check_first_layer(self.first_layer)

    def _config(self, names: list[str]) -> PeftConfig:
        return LoKrConfig(
            r=self.rank,
            alpha=self.rank if self.lora_alpha is None else self.lora_alpha,
            decompose_factor=self.factor,
            target_modules=names,
        )

    def _prepare(self, layer: Any) -> None:
        layer.__class__ = LoKrLinear


@dataclass(frozen=True)
class Shira(_Library):
    """Trains a few entries of each weight.

    Attributes:
        density: the share of a layer's entries that trains.
        mask: which. ``random`` draws them from the run's seed, the same at all clients.

    Source: Bhardwaj et al. (2024), SHiRA, section 3.1.
    """

    density: float = 0.01
    mask: Literal["random"] = "random"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"Expected 0 < density <= 1, got {self.density}.")
        check_first_layer(self.first_layer)

    def _config(self, names: list[str]) -> PeftConfig:
        return ShiraConfig(r=1, target_modules=names)

    def _prepare(self, layer: Any) -> None:
        # The library counts in ranks; with a share of the entries each layer gets its.
        layer.__class__ = ShiraLinear
        weight = layer.get_base_layer().weight
        count = max(1, round(self.density * weight.numel()))
        chosen = torch.randperm(weight.numel())[:count].sort().values
        layer.set_entries(_ADAPTER, chosen.to(weight.device))

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns the entries, filled up with zeros to the library's round numbers.

        Raises:
            ValueError: if the library cannot hold so many.
        """
        adapter = super().to_peft(backbone)
        tensors, layers = dict(adapter.tensors), list(_injected(backbone))
        sides = {name: sum(y.get_base_layer().weight.shape) for name, y in layers}
        rank = max(
            math.ceil(len(tensors[f"{name}.shira_weight"]) / side)
            for name, side in sides.items()
        )
        for name, layer in layers:
            if rank * sides[name] > layer.get_base_layer().weight.numel():
                raise ValueError(
                    f"Expected a lower density for the peft library, got "
                    f"{self.density}, too many entries for {name}: export it merged."
                )
            for end in ("shira_weight", "shira_indices"):
                held = tensors[f"{name}.{end}"]
                missing = rank * sides[name] - held.shape[-1]
                tensors[f"{name}.{end}"] = F.pad(held, (0, missing))
        return PeftAdapter(adapter.config | {"r": rank}, tensors)


def library_adapter(config: PeftConfig, tensors: Tensors) -> PeftAdapter:
    """Returns an adapter for inference, as plain values and copies of the tensors."""
    content = config.to_dict() | {"inference_mode": True}
    for key, value in content.items():
        if isinstance(value, set):
            content[key] = sorted(value)
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return PeftAdapter(content, copies)


def _injected(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _trainable(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in layer.named_parameters() if p.requires_grad}


def _drawn_key() -> int:
    """Draws the key of the random matrices from the run's seed."""
    return int(torch.randint(2**31, ()))


def _check_rank(field: str, rank: int, name: str, smallest: int) -> None:
    if rank > smallest:
        raise ValueError(
            f"Expected {field} <= {smallest}, the smaller side of {name}, got {rank}."
        )
