"""How an example chooses entries of a pool: by a feature of the frozen backbone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.interfaces import FrozenPart, HeadMaker
from fedpeft.passes import frozen_pass, handing_on, last_hidden, stack_of, watched
from fedpeft.peft._pools import Choice, PooledHead
from fedpeft.peft.pool_keys import Keys


class PoolQuery(nn.Module, FrozenPart, HeadMaker):
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
        pools_head: whether each entry has a head of its own.
        is_causal: whether a token sees only those before it.
    """

    def __init__(
        self,
        keys: Keys,
        choice: Choice,
        top_k: int,
        first_layer: int = 0,
        pools_head: bool = False,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys.keys, requires_grad=False)
        self.centre = nn.Parameter(keys.centre, requires_grad=False)
        self.choice = choice
        self.top_k = top_k
        self.first_layer = first_layer
        self.pools_head = pools_head
        self.is_causal = is_causal

    def make_head(self, num_features: int, num_labels: int) -> nn.Module:
        """Returns one head for all examples, or one an entry."""
        if not self.pools_head:
            return nn.Linear(num_features, num_labels)
        return PooledHead(self.choice, len(self.keys), num_features, num_labels)

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
            query = _pooled(hidden, inputs, self.is_causal)
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
    hidden: torch.Tensor, inputs: dict[str, torch.Tensor], is_causal: bool
) -> torch.Tensor:
    if "pixel_values" in inputs:
        return hidden[:, 0]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(hidden[:, :, 0])
    if is_causal:
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * mask.bool()).argmax(1)
        return hidden[torch.arange(len(hidden), device=mask.device), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def choose_first(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Chooses before the backbone's forward pass: a hook that hangs on it.

    It is handed that module, so that a copy of the backbone uses the copy's query.
    """
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
