"""Going on with a prompt: instruction data and causal language models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.backbone import Backbone
from fedpeft.data import Batch, Completion, Encoded, Examples, person_numbers
from fedpeft.errors import ConfigError
from fedpeft.sections import DataSection
from fedpeft.tasks.module import TaskModule
from fedpeft.tasks.task import Task, contents_of
from fedpeft.tasks.text_classification import padded


class CausalLM(TaskModule):
    """Backbone and its own frozen output layer; there is no other head."""

    def __init__(self, backbone: nn.Module, output: nn.Linear) -> None:
        super().__init__(backbone, 0, 0)
        self.output = output

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        kept: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps ids and mask ``(batch, tokens)`` to logits of the next tokens.

        Args:
            input_ids: token ids.
            attention_mask: 1 for a token, 0 for padding.
            kept: what the frozen part gave.
            positions: a mask of shape ``(batch, tokens)``: only there are logits
                wanted, since a row for each token of the vocabulary is large. None
                for everywhere.

        Returns:
            Shape ``(batch, tokens, vocabulary)``, or ``(chosen, vocabulary)``.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden = self.features(inputs, kept)
        logits: torch.Tensor = self.output(
            hidden if positions is None else hidden[positions]
        )
        return logits

    def pool(
        self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Returns the hidden state of every token."""
        return hidden


@dataclass(frozen=True)
class CausalLanguageModelling(Task):
    """A prompt in, its completion out; the loss is on the completion alone.

    An example is one row, whatever room it leaves: examples packed into one row would
    be clipped as one.

    Attributes:
        tokenizer: of the backbone.
        max_length: tokens of prompt and completion. A long prompt loses its beginning,
            but at most as much as leaves half of the row; a long completion its end.
    """

    is_loss = True

    tokenizer: Any
    max_length: int
    metric: str = "perplexity"

    @classmethod
    def of(cls, backbone: Backbone, data: DataSection) -> "CausalLanguageModelling":
        """Wants an output layer over the vocabulary, and a tokenizer."""
        if backbone.output is None or backbone.tokenizer is None:
            raise ConfigError(
                "[model] task: expected a causal language model, got "
                f"{backbone.name!r}, which has no output layer or no tokenizer."
            )
        return cls(backbone.tokenizer, data.max_length)

    def build(self, backbone: Backbone, num_labels: int) -> CausalLM:
        """Puts the model's own output layer, frozen, behind the backbone."""
        assert backbone.output is not None
        return CausalLM(backbone.module, backbone.output)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Returns the prompt's tokens, as a turn of a chat where there are such."""
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt)["input_ids"]
        return ids

    def encode(self, examples: Examples) -> Encoded:
        """Tokenises; `labels` say at which token each completion begins."""
        pairs = contents_of(examples, Completion, task="causal-lm")
        rows = [self._row(pair) for pair in pairs]
        return Encoded(
            [torch.tensor(ids) for ids, _ in rows],
            torch.tensor([start for _, start in rows], dtype=torch.int64),
            person_numbers(examples.persons),
        )

    def _row(self, pair: Completion) -> tuple[list[int], int]:
        prompt = self.prompt_ids(pair.prompt)
        ending = self.tokenizer.eos_token_id
        completion = self.tokenizer(pair.completion, add_special_tokens=False)
        answer = [*completion["input_ids"], *([] if ending is None else [ending])]
        room = max(self.max_length - len(answer), self.max_length // 2)
        prompt = prompt[-room:]
        return (prompt + answer)[: self.max_length], len(prompt)

    def collate(self, encoded: Encoded, indices: Sequence[int]) -> Batch:
        """Pads to the longest."""
        chosen = encoded.subset(indices)
        return Batch(padded(chosen.inputs, self.tokenizer.pad_token_id), chosen.labels)

    @torch.inference_mode()
    def complete(self, module: nn.Module, prompt: str, max_tokens: int = 40) -> str:
        """Goes on with a prompt, always by the likeliest token.

        The model never sees more than the last `max_length` tokens: there may be no
        positions for more.

        Without a cache of keys and values: methods that add tokens or choose by the
        prompt need none to be exact.
        """
        device = next(module.parameters()).device
        ids = self.prompt_ids(prompt)
        given = len(ids)
        for _ in range(max_tokens):
            row = torch.tensor([ids[-self.max_length :]], device=device)
            logits = module(input_ids=row, attention_mask=torch.ones_like(row))
            following = int(logits[0, -1].argmax())
            if following == self.tokenizer.eos_token_id:
                break
            ids.append(following)
        text: str = self.tokenizer.decode(ids[given:], skip_special_tokens=True)
        return text.strip()

    def losses(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the mean cross-entropy of each completion's tokens."""
        total, count = self._sums(module, batch, kept)
        return total / count.clamp(min=1)

    def judge(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the summed cross-entropy and the number of tokens, ``(batch, 2)``."""
        return torch.stack(self._sums(module, batch, kept), 1)

    def metrics(self, judged: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Returns the perplexity over all completions' tokens together."""
        total, count = judged.double().sum(0)
        return {self.metric: float((total / count.clamp(min=1)).exp())}

    def _sums(
        self, module: nn.Module, batch: Batch, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        places = torch.arange(ids.shape[1] - 1, device=ids.device)
        # The token at a place is told by the hidden state before it.
        told = (places >= batch.labels[:, None] - 1) & mask[:, 1:].bool()
        positions = torch.cat((told, torch.zeros_like(told[:, :1])), 1)
        logits = module(**batch.inputs, kept=kept, positions=positions).float()
        rows = told.nonzero()[:, 0]
        each = F.cross_entropy(logits, ids[:, 1:][told], reduction="none")
        total = torch.zeros(len(ids), device=ids.device).index_add(0, rows, each)
        return total, told.sum(1).float()
