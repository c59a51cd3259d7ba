"""A pool of scales and shifts, of which each example chooses its own."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.passes import hidden_size, stack_of
from fedpeft.peft._counter import Counter
from fedpeft.peft._layers import (
    check_above_zero,
    check_depth,
    check_first_layer,
    check_positive,
    freeze,
    is_linear_or_norm,
    modules_from,
    roles_of,
)
from fedpeft.peft._pool_query import PoolQuery, choose_first
from fedpeft.peft._pools import Choice, PooledScaleShift
from fedpeft.peft.pool_keys import Keys, read_keys
from fedpeft.peft.ssf import SSF, features_of


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
        head: ``shared`` by all examples; ``pooled`` for one head an entry, of which an
            example gets the mean of those it has chosen.
        counts: whether a client's update says how often its examples chose each entry,
            for ``[aggregation] name = "pool_weighted"``. Under DP the counts are a part
            of what is clipped and noised. With SGD without momentum alone.
        count_scale: how far a chosen entry moves an example's gradient, in units of the
            gradient: the larger, the more of the clipping norm goes to counts.
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
    head: Literal["shared", "pooled"] = "shared"
    counts: bool = False
    count_scale: float = 0.1
    keys: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_positive(pool_size=self.pool_size, top_k=self.top_k)
        check_first_layer(self.first_layer)
        check_above_zero(count_scale=self.count_scale)
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
            ValueError: if there are more entries than features for orthonormal keys,
                the file of keys is not the one expected, or the architecture is
                unknown.
        """
        if self.pool_size == 1:
            return SSF(self.first_layer).attach(backbone)
        freeze(backbone)
        check_depth(self.first_layer, backbone)
        stack_of(backbone)
        roles = roles_of(backbone, "choose ssf")
        choice, operations = Choice(), []
        wanted = modules_from(backbone, self.first_layer, is_linear_or_norm)
        backbone.pool_query = PoolQuery(
            self._keys(hidden_size(backbone)),
            choice,
            self.top_k,
            self.first_layer,
            self.head == "pooled",
            roles.is_causal,
        )
        for name, module in wanted:
            added = PooledScaleShift(choice, self.pool_size, features_of(module))
            backbone.set_submodule(name, nn.Sequential(module, added))
            operations.append(added.operation)
        if self.counts:  # behind the last pool, through which every gradient passes
            counter = Counter(choice, self.pool_size, self.count_scale)
            name, module = wanted[-1]
            backbone.set_submodule(name, nn.Sequential(module, added, counter))
            operations.append(counter.operation)
        backbone.register_forward_pre_hook(choose_first, with_kwargs=True)
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
