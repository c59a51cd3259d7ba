"""How well scores tell members from others: what all membership attacks report."""

from typing import Final

import torch

from fedpeft.attacks.attack import Scores, Secret

MEMBERSHIP: Final[dict[str, str]] = {
    "auc": "share",
    "tpr_at_fpr_1e-2": "share",
    "tpr_at_fpr_1e-3": "share",
}
"""Metric -> unit."""

_RATES: Final[dict[str, float]] = {"tpr_at_fpr_1e-2": 1e-2, "tpr_at_fpr_1e-3": 1e-3}


def membership_scores(guess: torch.Tensor, secret: Secret) -> Scores:
    """Judges the scores of candidates: one value a member.

    A rate is left out where there are too few non-members to resolve it, a hundred or a
    thousand: above all of fifty is no sign of one in a thousand. Ties speak for the
    client: half for the AUC, against the member for the rates.

    >>> secret = Secret(None, is_member=torch.tensor([True, False, False]))
    >>> membership_scores(torch.tensor([2.0, 1.0, 2.0]), secret)["auc"].tolist()
    [0.75]

    Args:
        guess: one score a candidate, larger for a member, shape ``(candidates,)``.
        secret: says which are members.

    Raises:
        ValueError: unless there are members and others among them, each with a finite
            score.
    """
    is_member = secret.is_member
    if is_member is None or len(is_member) != len(guess):
        raise ValueError("Expected the truth of every candidate, got another number.")
    if not guess.isfinite().all():  # compared with others, none would count as less
        raise ValueError("Expected a finite score of every candidate, got another.")
    members, others = guess[is_member].double(), guess[~is_member].double()
    if not len(members) or not len(others):
        raise ValueError(
            f"Expected members and others among the candidates, got {len(members)} and "
            f"{len(others)}."
        )
    below = (others < members[:, None]).double().mean(1)
    not_below = (others >= members[:, None]).double().mean(1)
    equal = 1 - below - (others > members[:, None]).double().mean(1)
    scores = {"auc": below + equal / 2}
    for metric, rate in _RATES.items():
        if len(others) * rate >= 1:
            scores[metric] = (not_below <= rate).double()
    return scores


def coin_scores(secret: Secret, rng: torch.Generator) -> Scores:
    """Judges scores that are drawn: the baseline of every membership attack."""
    assert secret.is_member is not None
    return membership_scores(torch.rand(len(secret.is_member), generator=rng), secret)
