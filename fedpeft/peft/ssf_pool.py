"""A pool of scales and shifts, of which each example chooses its own."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import FrozenPart, Operation, PeftMethod
from fedpeft.peft._layers import (
    check_depth,
    check_first_layer,
    check_positive,
    freeze,
    is_linear_or_norm,
    model_type,
    modules_from,
)
from fedpeft.peft._passes import (
    frozen_pass,
    handing_on,
    hidden_size,
    last_hidden,
    stack_of,
    watched,
)
from fedpeft.peft.pool_keys import Keys, read_keys
from fedpeft.peft.ssf import SSF, features_of

_CAUSAL_TYPES = ("llama", "mistral", "qwen2")


class Choice:
    """Which entries the examples of the batch at hand have chosen.

    One object for the whole backbone, shared by all its pools: a copy of the backbone
    shares a copy of it. It is no part of any state, so that nothing of it travels. It
    stays until the next batch chooses: activation checkpointing reads it again.

    Attributes:
        indices: shape ``(batch, top_k)``; None while no pool takes part.
    """

    def __init__(self) -> None:
        self.indices: torch.Tensor | None = None


class PooledScaleShift(nn.Module):
    """``scale * y + shift`` with the mean of the pairs that each example has chosen.

    All pairs are the identity until they are trained. What makes them differ is that
    different examples choose them.

    Shapes: ``(batch, ..., features)`` -> the same.

    Args:
        choice: what the examples have chosen.
        pool_size: the number of pairs.
        features: size of the last dimension.
    """

    def __init__(self, choice: Choice, pool_size: int, features: int) -> None:
        super().__init__()
        self.choice = choice
        self.scale = nn.Parameter(torch.ones(pool_size, features))
        self.shift = nn.Parameter(torch.zeros(pool_size, features))

    @property
    def indices(self) -> torch.Tensor | None:
        """The chosen entries, shape ``(batch, top_k)``."""
        return self.choice.indices

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Scales and shifts in the dtype of `y`; the identity without a choice."""
        if self.indices is None:
            return y
        scale, shift = (
            chosen_mean(pool, self.indices, y) for pool in (self.scale, self.shift)
        )
        return torch.addcmul(shift, y, scale)

    @property
    def operation(self) -> Operation:
        """How its parameters act."""
        return Operation(self, "pool", dict(self.named_parameters()))


def chosen_mean(
    pool: torch.Tensor, indices: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Returns each example's mean entry, in the dtype of `y` and ready to broadcast.

    Shapes: pool ``(entries, features)``, indices ``(batch, top_k)``, y ``(batch, ...,
    features)`` -> ``(batch, 1, ..., features)``.
    """
    mean = F.embedding(indices, pool).mean(1).to(y.dtype)
    return mean.view(len(mean), *(1 for _ in y.shape[2:]), -1)


class PoolQuery(nn.Module, FrozenPart):
    """Lets each example choose: the entries whose keys are the nearest to its query.

    The query is what the frozen backbone without any pool gives for the example: the
    class token of an image, the mean over a text's tokens, or its last token where a
    token sees only those before it. It never changes, so it is computed once an example
    and kept, with the hidden state below the first pool.

    Args:
        keys: what queries are compared with, by cosine.
        choice: where what is chosen is put.
        top_k: how many entries an example chooses.
        first_layer: the lowest with a pool.
    """

    def __init__(self, keys: Keys, choice: Choice, top_k: int, first_layer: int):
        super().__init__()
        self.keys = nn.Parameter(keys.keys, requires_grad=False)
        self.centre = nn.Parameter(keys.centre, requires_grad=False)
        self.choice = choice
        self.top_k = top_k
        self.first_layer = first_layer

    def choose(self, query: torch.Tensor) -> None:
        """Chooses for queries ``(batch, features)``."""
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            directions = F.normalize(query.float() - self.centre, dim=1)
            likeness = directions @ F.normalize(self.keys, dim=1).t()
            self.choice.indices = likeness.topk(self.top_k, dim=1).indices

    def compute(
        self, backbone: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Returns queries, ``(batch, features)``.

        Where layers lie below the first pool: ``(batch, 1 + tokens, features)``, the
        query before the hidden state.
        """
        below = stack_of(backbone)[: self.first_layer][-1:]
        device = self.keys.device.type
        self.choice.indices = None
        with frozen_pass(backbone, device), watched(below) as outputs:
            hidden = last_hidden(backbone, inputs)
            query = _pooled(hidden, inputs, model_type(backbone))
        if not outputs:
            return query
        return torch.cat((query.unsqueeze(1), outputs[0]), 1)

    def resume(
        self,
        backbone: nn.Module,
        inputs: dict[str, torch.Tensor],
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Chooses, and runs the backbone with the pools."""
        if kept.dim() == 2:
            self.choose(kept)
            return last_hidden(backbone, inputs)
        self.choose(kept[:, 0])
        with handing_on(stack_of(backbone)[: self.first_layer], kept[:, 1:]):
            return last_hidden(backbone, inputs)


def _pooled(
    hidden: torch.Tensor, inputs: dict[str, torch.Tensor], kind: str
) -> torch.Tensor:
    if "pixel_values" in inputs:
        return hidden[:, 0]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(hidden[:, :, 0])
    if kind in _CAUSAL_TYPES:
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * mask.bool()).argmax(1)
        return hidden[torch.arange(len(hidden), device=mask.device), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


# Handed the module it hangs on, so that a copy of the backbone uses the copy's query.
def _choose_first(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    first = getattr(backbone, "main_input_name", "input_ids")
    inputs = dict(zip((first, "attention_mask"), args, strict=False)) | kwargs
    if len(args) > 2 or inputs.get("past_key_values") is not None:
        raise ValueError(
            "Expected whole inputs for a pool to choose by, got earlier keys and "
            "values, or more arguments without a name."
        )
    query = backbone.get_submodule("pool_query")
    assert isinstance(query, PoolQuery)
    computed = query.compute(backbone, inputs)
    query.choose(computed if computed.dim() == 2 else computed[:, 0])
    return (), inputs


@dataclass(frozen=True)
class SSFPool(PeftMethod):
    """Scales and shifts that fit the example: each chooses `top_k` of a pool's pairs.

    A pool stands behind every linear and normalisation layer; an example's scale there
    is the mean of its chosen entries' scales, the same entries in every layer.

    **Guarantees**: which entries an example chooses depends on the example, the
    backbone and the keys alone. It is never part of a state, so that it never leaves
    the client; under DP-SGD a gradient that shows it is clipped and noised like any
    other. Keys do not train: what examples choose would then depend on other clients'
    data, and could be kept no more. They must not come from clients' data at all, since
    they are a part of the configuration and hence public.

    Not for generation: the query of a causal model is its last token's state, so that a
    prompt chooses anew with every token that is added to it, and in training a
    completion takes part in the choice.

    Attributes:
        pool_size: the number of pairs of each pool. A pool of one is SSF. The noise of
            DP falls on all of them, an example's gradient only on those it has chosen:
            small pools are better there.
        top_k: how many of them an example chooses.
        first_layer: add pools only in this layer and above.
        keys: path of a safetensors file of :func:`fit_keys` on public features; None
            for random orthonormal keys from the run's seed.
        sha256: of that file, in hexadecimal digits: all clients need the same.

    Source: Feng et al. (2023), FedIns, arXiv:2308.06051, section 3: there with keys
    that train by a term in the loss which pulls them to the queries, pools of 25 of
    which 3 are chosen, and scales and shifts that start at random.
    """

    pool_size: int = 8
    top_k: int = 2
    first_layer: int = 0
    keys: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_positive(pool_size=self.pool_size, top_k=self.top_k)
        check_first_layer(self.first_layer)
        if self.top_k > self.pool_size:
            raise ValueError(
                f"Expected top_k <= pool_size = {self.pool_size}, got {self.top_k}."
            )
        if (self.keys is None) != (self.sha256 is None):
            raise ValueError(
                "Expected keys = FILE and sha256 = DIGITS together, got one of them."
            )

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts pools behind the layers, in place, and the query beside them.

        Raises:
            ValueError: if there are more entries than features for orthonormal keys, or
                the file of keys is not the one expected.
        """
        if self.pool_size == 1:
            return SSF(self.first_layer).attach(backbone)
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        stack_of(backbone)
        choice, operations = Choice(), []
        wanted = modules_from(backbone, self.first_layer, is_linear_or_norm)
        backbone.pool_query = PoolQuery(
            self._keys(hidden_size(backbone)), choice, self.top_k, self.first_layer
        )
        for name, module in wanted:
            added = PooledScaleShift(choice, self.pool_size, features_of(module))
            backbone.set_submodule(name, nn.Sequential(module, added))
            operations.append(added.operation)
        backbone.register_forward_pre_hook(_choose_first, with_kwargs=True)
        return operations

    def _keys(self, features: int) -> Keys:
        if self.keys is not None and self.sha256 is not None:
            return read_keys(self.keys, self.sha256, self.pool_size, features)
        if self.pool_size > features:
            raise ValueError(
                f"Expected pool_size <= {features}, the features of the backbone, for "
                f"orthonormal keys, got {self.pool_size}."
            )
        keys = nn.init.orthogonal_(torch.empty(self.pool_size, features))
        return Keys(keys, torch.zeros(features))
