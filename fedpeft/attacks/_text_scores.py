"""How much of a text was found: token by token, in order, and as a whole."""

from collections.abc import Sequence

import torch

from fedpeft.attacks.attack import Scores
from fedpeft.data import Encoded
from fedpeft.tasks import CausalLanguageModelling, TextClassification


def text_scores(ranking: torch.Tensor, truth: Encoded) -> Scores:
    """Compares one guess with each text, special tokens at both ends left out.

    * ``token_top1``: share of the text's tokens guessed at their own place;
    * ``token_top10``: share that is among the ten guessed there;
    * ``rouge_l``: F-measure of the longest common subsequence (Lin 2004, ROUGE);
    * ``exact_match``: 1 where the whole text was guessed.

    Args:
        ranking: tokens of each place, best first, ``(length, 10)``.
        truth: the texts; a text without any token counts as 0.
    """
    rows = [_scores(ranking, text) for text in truth.inputs]
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    names = ("token_top1", "token_top10", "rouge_l", "exact_match")
    return dict(zip(names, table.t(), strict=True))


def _scores(ranking: torch.Tensor, text: torch.Tensor) -> list[float]:
    wanted, guessed = text[1:-1], ranking[1:-1]
    both = min(len(wanted), len(guessed))
    if len(wanted) == 0:
        return [0.0] * 4
    hits = guessed[:both] == wanted[:both, None]
    is_whole = len(text) == len(ranking) and bool(hits[:, 0].all())
    return [
        float(hits[:, 0].sum()) / len(wanted),
        float(hits.any(1).sum()) / len(wanted),
        rouge_l(guessed[:, 0].tolist(), wanted.tolist()),
        float(is_whole),
    ]


def rouge_l(guessed: Sequence[int], wanted: Sequence[int]) -> float:
    """Returns the F-measure of the longest common subsequence.

    >>> rouge_l([1, 9, 3], [1, 2, 3, 4, 5])
    0.5
    """
    row = [0] * (len(wanted) + 1)
    for token in guessed:
        before = row
        row = [0]
        for place, other in enumerate(wanted):
            same = before[place] + 1 if token == other else 0
            row.append(max(same, row[place], before[place + 1]))
    return 2 * row[-1] / max(1, len(guessed) + len(wanted))


def words_of(
    task: TextClassification | CausalLanguageModelling, tokens: Sequence[int]
) -> str:
    """Returns tokens as a person reads them, special ones left out."""
    text: str = task.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text
