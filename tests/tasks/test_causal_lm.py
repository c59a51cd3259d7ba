"""Instructions: the loss is on the completion alone, one example a row."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpeft.backbone import Backbone, load_backbone
from fedpeft.data import Completion, Examples
from fedpeft.errors import ConfigError
from fedpeft.sections import DataSection
from fedpeft.tasks import CausalLanguageModelling, CausalLM
from tests.helpers import VOCABULARY, tiny_bert, tiny_llama

END = 63


class Letters:
    """One token a letter, counted from a; no padding, no chat."""

    chat_template = None
    pad_token_id = None
    eos_token_id = END

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def task(max_length: int = 32) -> CausalLanguageModelling:
    return CausalLanguageModelling(Letters(), max_length)


def pairs(*contents: tuple[str, str]) -> Examples:
    completions = tuple(Completion(*content) for content in contents)
    return Examples(completions, torch.zeros(len(contents)).long(), None, ("",))


def model() -> CausalLM:
    torch.manual_seed(0)
    output = nn.Linear(32, VOCABULARY, bias=False).requires_grad_(False)
    return CausalLM(tiny_llama(), output).eval()


def test_a_row_is_prompt_completion_and_end() -> None:
    encoded = task().encode(pairs(("ab", "cd"), ("", "a")))
    assert encoded.inputs[0].tolist() == [0, 1, 2, 3, END]
    assert encoded.labels.tolist() == [2, 0]


def test_a_long_prompt_loses_its_beginning_a_long_completion_its_end() -> None:
    encoded = task(6).encode(pairs(("abcdefgh", "xy"), ("abcd", "tuvwxyz")))
    assert encoded.inputs[0].tolist() == [5, 6, 7, 23, 24, END]  # fgh xy end
    assert encoded.inputs[1].tolist() == [1, 2, 3, 19, 20, 21]  # bcd tuv
    assert encoded.labels.tolist() == [3, 3]


def test_losses_are_the_completions_means_by_hand() -> None:
    module, encoded = model(), task().encode(pairs(("abc", "de"), ("ghijk", "l")))
    losses = task().losses(module, task().collate(encoded, [0, 1]))
    for row, start, loss in zip(encoded.inputs, encoded.labels, losses, strict=True):
        alone = row.unsqueeze(0)
        logits = module(alone, torch.ones_like(alone))[0]
        expected = F.cross_entropy(logits[start - 1 : -1], row[start:])
        assert torch.isclose(loss, expected, atol=1e-5)


def test_the_prompt_is_no_part_of_the_loss() -> None:
    module = model()
    logits_at: list[int] = []
    handle = module.output.register_forward_pre_hook(
        lambda _, args: logits_at.append(args[0].shape[0])
    )
    encoded = task().encode(pairs(("abcdef", "xy")))
    task().losses(module, task().collate(encoded, [0]))
    handle.remove()
    assert logits_at == [3]  # x, y and the end


def test_perplexity_is_over_all_tokens_together() -> None:
    judged = torch.tensor([[math.log(2) * 3, 3.0], [math.log(8) * 1, 1.0]])
    # Three tokens of log 2 and one of 3 log 2: a mean of 1.5 log 2.
    metrics = task().metrics(judged, torch.zeros(2))
    assert metrics["perplexity"] == pytest.approx(2**1.5, rel=1e-6)


def test_an_example_without_a_completion_counts_nothing() -> None:
    module, encoded = model(), task(4).encode(pairs(("abcd", "xyz"), ("ab", "c")))
    batch = task().collate(encoded, [0, 1])
    batch.labels[0] = len(encoded.inputs[0])  # nothing is left to tell
    losses = task().losses(module, batch)
    assert losses[0] == 0
    assert losses[1] > 0


def test_a_completion_ends_at_its_end() -> None:
    module = model()
    with torch.no_grad():
        module.output.weight.zero_()
    assert task().complete(module, "ab", max_tokens=3) == "aaa"  # all are as likely
    with torch.no_grad():
        module.output.weight[END] = module.backbone(
            input_ids=torch.tensor([[0, 1]])
        ).last_hidden_state[0, -1]
    assert task().complete(module, "ab", max_tokens=3) == ""


def test_a_backbone_without_an_output_layer_is_refused() -> None:
    encoder = Backbone("minilm", tiny_bert(), Letters(), 32, "fingerprint")
    with pytest.raises(ConfigError, match="'minilm', which has no output layer"):
        CausalLanguageModelling.of(encoder, DataSection(name="review-writing"))


def test_other_data_are_refused() -> None:
    texts = Examples(("a",), torch.tensor([0]), None, ("x", "y"))
    with pytest.raises(ConfigError, match="causal-lm, got texts"):
        task().encode(texts)


@pytest.mark.slow
def test_the_real_model_answers_in_its_own_turns(smollm2: Path) -> None:
    backbone = load_backbone("smollm2", "causal-lm")
    real = CausalLanguageModelling.of(backbone, DataSection(name="review-writing"))
    module = real.build(backbone, 1).eval()
    capital = "What is the capital of France? Answer with one word."
    assert "Paris" in real.complete(module, capital, max_tokens=8)
    encoded = real.encode(pairs((capital, "Paris"), (capital, "Bananas")))
    right, wrong = real.losses(module, real.collate(encoded, [0, 1]))
    assert right < wrong
    start = int(encoded.labels[0])
    told = encoded.inputs[0][start:]
    assert real.tokenizer.decode(told) == "Paris<|im_end|>"


def test_what_the_model_sees_never_outgrows_the_row() -> None:
    module, seen = model(), []
    with torch.no_grad():
        module.output.weight.zero_()
    module.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()),
        with_kwargs=True,
    )
    assert task(4).complete(module, "bcdef", max_tokens=3) == "aaa"
    assert seen == [[2, 3, 4, 5], [3, 4, 5, 0], [4, 5, 0, 0]]
