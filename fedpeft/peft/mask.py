"""Sparse fine-tuning: a fixed set of entries of the frozen weights trains."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from peft import ShiraConfig
from torch import nn

from fedpeft.interfaces import Operation, PeftAdapter, PeftMethod
from fedpeft.peft._derived import DerivedLinear
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    freeze,
    linear_at,
    modules_from,
    names_ending,
)
from fedpeft.peft.library import library_adapter
from fedpeft.peft.scores import highest, read_scores
from fedpeft.tensors import Tensors

Source = Literal["random", "fish", "spt"]


class Masked(DerivedLinear):
    """A frozen linear layer to some entries of which trainable values are added.

    The sum is a copy of the weight, which autograd keeps until the backward pass.

    Shapes: ``(batch, ..., in)`` -> ``(batch, ..., out)``.

    Args:
        base: the frozen layer, whose weight stays as it is.
        places: of the entries in the flat weight, ascending, int64.
    """

    def __init__(self, base: nn.Linear, places: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.values = nn.Parameter(torch.zeros(len(places)))
        # A frozen parameter, not a buffer: whoever has the values needs the places.
        self.places = nn.Parameter(places, requires_grad=False)

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen layer's."""
        return self.base.bias

    def weight_from(self, parameters: Tensors) -> torch.Tensor:
        """Returns the frozen weight plus the values at their places."""
        weight = self.base.weight
        values = parameters["values"].to(weight.dtype)
        return weight.flatten().scatter_add(0, self.places, values).view_as(weight)

    def pull_back(self, gradient: torch.Tensor, x: torch.Tensor) -> Tensors:
        """Returns each example's gradient at the places alone.

        Shapes: ``(batch, positions, out)`` and ``(batch, positions, in)``. It takes no
        more memory than one example's gradient of the whole weight.
        """
        # Measured on a CPU at 64 positions, where the two ways take equally long, too.
        is_sparse = 2 * len(self.places) * x.shape[1] <= self.base.weight.numel()
        pick = self._few if is_sparse else self._many
        pairs = zip(gradient, x, strict=True)
        rows = [pick(g, inputs) for g, inputs in pairs]
        empty = gradient.new_zeros(0, len(self.places))
        return {"values": torch.stack(rows) if rows else empty}

    def _few(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """One inner product over positions an entry."""
        row, column = self.places // x.shape[1], self.places % x.shape[1]
        left, right = gradient.T.contiguous(), x.T.contiguous()
        sums: torch.Tensor = torch.linalg.vecdot(left[row], right[column])
        return sums

    def _many(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The whole product, of which the rest is thrown away."""
        return (gradient.T @ x).flatten()[self.places]


@dataclass(frozen=True)
class Mask(PeftMethod):
    """Adds trainable values to a fixed set of entries of linear layers' weights.

    The set is the same at every client; the values alone travel. Under privacy it must
    not depend on private data, through which it would leak, to every client and with
    every update: it is drawn from the run's seed, or it follows from scores of *public*
    examples in a file (:mod:`fedpeft.peft.scores`) that every client has, and that is
    known by its hash.

    Attributes:
        density: share of the entries that train, in (0, 1].
        source: ``random`` takes that share of each matrix. ``fish`` and ``spt`` take
            the entries with the highest scores of all matrices together; they differ in
            what the file was made with: the empirical Fisher information, or the
            sensitivity of a few batches.
        public: path of that safetensors file: one tensor of scores a weight, by the
            weight's name in the backbone.
        sha256: of that file, in hexadecimal digits.
        target_modules: ends of the layers' names; None takes all linear layers.
        first_layer: take them from this layer and above; 0 includes what lies outside
            the layers.

    Source: Sung et al. (2021), Training Neural Networks with Fixed Sparse Masks,
    section 3 (``fish``); He et al. (2023), Sensitivity-Aware Visual Parameter-Efficient
    Fine-Tuning, section 3.2 (``spt``), without its LoRA where a matrix has many chosen
    entries.
    """

    density: float = 0.005
    source: Source = "random"
    public: str | None = None
    sha256: str | None = None
    target_modules: tuple[str, ...] | None = None
    first_layer: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"Expected density in (0, 1], got {self.density}.")
        if self.source not in get_args(Source):
            raise ValueError(
                f"Expected source in {', '.join(get_args(Source))}, got "
                f"{self.source!r}."
            )
        if self.source == "random" and (self.public or self.sha256):
            raise ValueError(
                "Expected neither public nor sha256 with source = 'random', got one: "
                "choose source = 'fish' or 'spt'."
            )
        if self.source != "random" and not (self.public and self.sha256):
            raise ValueError(
                f"Expected public = FILE and sha256 = DIGITS with source = "
                f"{self.source!r}, got none: the mask shows the scores to all, so they "
                "must come from public examples; those of private data would have to be"
                " charged."
            )
        check_first_layer(self.first_layer)

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts the masked layers in the place of the frozen ones.

        Raises:
            ValueError: if no layer matches, or the score file is not the one expected.
        """
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        operations = []
        for (name, base), places in self._places(self._layers(backbone)):
            if len(places):
                masked = Masked(base, places)
                backbone.set_submodule(name, masked)
                operations += masked.operations
        return operations

    def _layers(self, backbone: nn.Module) -> list[tuple[str, nn.Linear]]:
        if self.target_modules:
            names = names_ending(backbone, self.first_layer, self.target_modules)
        else:
            wanted = modules_from(
                backbone, self.first_layer, lambda module: isinstance(module, nn.Linear)
            )
            names = [name for name, _ in wanted]
        if not names:
            raise ValueError(
                "Expected a backbone with linear layers, got one without: choose "
                "another method."
            )
        return [(name, linear_at(backbone, name)) for name in names]

    def _places(
        self, layers: list[tuple[str, nn.Linear]]
    ) -> list[tuple[tuple[str, nn.Linear], torch.Tensor]]:
        sizes = [base.weight.numel() for _, base in layers]
        if self.public and self.sha256:
            shapes = {f"{name}.weight": base.weight.shape for name, base in layers}
            scores = read_scores(self.public, self.sha256, shapes)
            flat = torch.cat([scores[name].flatten() for name in shapes])
            chosen = highest(flat, _share(len(flat), self.density))
            places = [part.nonzero().flatten() for part in torch.split(chosen, sizes)]
        else:
            draws = [
                torch.randperm(size)[: _share(size, self.density)] for size in sizes
            ]
            places = [draw.sort().values for draw in draws]
        return list(zip(layers, places, strict=True))

    def merge(self, backbone: nn.Module) -> None:
        """Adds the values to the frozen weights."""
        for name, module in list(backbone.named_modules()):
            if isinstance(module, Masked):
                with torch.no_grad():
                    module.base.weight.copy_(module.weight)
                backbone.set_submodule(name, module.base)

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns a SHiRA adapter, filled up with zeros to the sizes that it knows.

        Raises:
            ValueError: if a matrix would need more entries than it has.
        """
        masked = {n: m for n, m in backbone.named_modules() if isinstance(m, Masked)}
        rank = max(
            math.ceil(len(module.places) / sum(module.base.weight.shape))
            for module in masked.values()
        )
        tensors = {}
        for name, module in masked.items():
            size = rank * sum(module.base.weight.shape)
            if size > module.base.weight.numel():
                raise ValueError(
                    f"Expected a mask of at most {module.base.weight.numel()} entries "
                    f"at {name} for the peft library's SHiRA, got {size}, as many as "
                    "the fullest layer's: export it merged."
                )
            padding = (0, size - len(module.places))
            places, columns = F.pad(module.places, padding), module.base.in_features
            indices = torch.stack((places // columns, places % columns)).int()
            tensors[f"{name}.shira_weight"] = F.pad(module.values, padding)
            tensors[f"{name}.shira_indices"] = indices
        config = ShiraConfig(r=rank, target_modules=list(masked))
        return library_adapter(config, tensors)


def _share(size: int, density: float) -> int:
    return max(1, round(density * size))
