"""Trainable rows of the token embedding, for the words of a domain."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import TrainableTokensConfig
from torch import nn

from fedpeft.interfaces import Operation, PeftAdapter, PeftMethod
from fedpeft.peft._layers import freeze
from fedpeft.peft.library import library_adapter
from fedpeft.peft.prompt import embedding_of


class TokenTable(nn.Module):
    """A frozen embedding table; to some of its rows something trainable is added.

    Shapes: ids ``(batch, tokens)`` -> ``(batch, tokens, features)``.

    Args:
        table: the frozen embedding.
        token_ids: which rows train.
    """

    place: torch.Tensor

    def __init__(self, table: nn.Embedding, token_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.table = table
        self.rows = nn.Embedding(len(token_ids), table.embedding_dim)
        nn.init.zeros_(self.rows.weight)
        self.rows.to(table.weight)
        place = torch.full((table.num_embeddings,), -1)
        place[list(token_ids)] = torch.arange(len(token_ids))
        self.register_buffer("place", place, persistent=False)
        self.place = self.place.to(table.weight.device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Looks up; a token without a trainable row gets nothing added."""
        place = self.place[ids]
        has_row = (place >= 0).unsqueeze(-1)
        embedded: torch.Tensor = self.table(ids)
        added: torch.Tensor = self.rows(place.clamp(min=0))
        return embedded + added * has_row


@dataclass(frozen=True)
class TokenRows(PeftMethod):
    """Trains the input embedding of given tokens; all other rows stay frozen.

    Attributes:
        token_ids: whose rows train. A public list: chosen from the clients' data it
            would itself have to be released privately.

    Ghazi et al. (2023), Sparsity-Preserving Differentially Private Training of Large
    Embedding Models, choose the rows privately instead.
    """

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        ids = self.token_ids
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0:
            raise ValueError(f"Expected distinct token_ids >= 0, got {list(ids)}.")

    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Puts the trainable rows beside the table.

        Raises:
            ValueError: if the backbone has no such token.
        """
        table = embedding_of(backbone)
        if max(self.token_ids) >= table.num_embeddings:
            raise ValueError(
                f"Expected token_ids < {table.num_embeddings}, the size of the "
                f"vocabulary, got {max(self.token_ids)}."
            )
        freeze(backbone)
        wrapped = TokenTable(table, self.token_ids)
        model: Any = backbone
        model.set_input_embeddings(wrapped)
        parameters = dict(wrapped.rows.named_parameters())
        return [Operation(wrapped.rows, "embedding", parameters)]

    def merge(self, backbone: nn.Module) -> None:
        """Adds the rows to the table.

        The table gets a weight of its own: an output layer that shares it stays frozen.
        """
        model: Any = backbone
        wrapped = model.get_input_embeddings()
        weight = wrapped.table.weight.detach().clone()
        weight[list(self.token_ids)] += wrapped.rows.weight.detach()
        wrapped.table.weight = nn.Parameter(weight, requires_grad=False)
        model.set_input_embeddings(wrapped.table)

    def to_peft(self, backbone: nn.Module) -> PeftAdapter:
        """Returns the library's trainable tokens, which hold the rows as they are."""
        model: Any = backbone
        wrapped = model.get_input_embeddings()
        name = next(n for n, module in backbone.named_modules() if module is wrapped)
        ids = list(self.token_ids)
        rows = wrapped.table.weight.detach()[ids] + wrapped.rows.weight.detach()
        config = TrainableTokensConfig(target_modules=[name], token_indices=ids)
        return library_adapter(
            config, {f"{name}.trainable_tokens_delta": rows.cpu().clone()}
        )
