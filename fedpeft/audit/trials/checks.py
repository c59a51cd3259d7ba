"""Facts that need no statistics: ledgers that add up, noise that is drawn afresh."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedpeft.audit.results import Check
from fedpeft.errors import PrivacyBudgetExceeded
from fedpeft.privacy import (
    Composition,
    Plan,
    Question,
    Randomness,
    epsilon,
    open_release,
)
from fedpeft.privacy.ledger import Entry, Ledger, ledger_as_it_stands

_DRAWN = 1 << 16
_PARTS = 4
_MOST_CORRELATED = 0.06
"""Of 16,384 pairs of independent values: 7.7 standard deviations, one in 10^14."""

_NONCE_DIGITS = 32
_HIDDEN = ("cohort_size", "replies", "failures", "bytes_up")
_ANOTHER_RUN = "another run"


def ledger_checks(ledger: Ledger, *, answers: int, delta: float) -> list[Check]:
    """Compares a ledger with the answers that its client gave.

    Args:
        ledger: as it stands.
        answers: that have left the client and were to be charged.
        delta: at which the ledger's epsilon is looked at.
    """
    source, entries = ledger.data_source, ledger.entries
    history = [entry.composition for entry in entries]
    return [
        _charged(source, len(entries), answers),
        _adds_up(source, history, ledger.spent(delta), delta),
        _nonces(source, entries),
    ]


def _charged(source: str, entries: int, answers: int) -> Check:
    return Check(
        f"ledger of {source}: every answer is charged",
        "ok" if entries == answers else "failed",
        f"Expected {answers} entries for {answers} answers, found {entries}.",
        falsifies=entries < answers,
    )


def _adds_up(
    source: str, history: Sequence[Composition], spent: float, delta: float
) -> Check:
    whole = epsilon(history, delta)
    holds = spent >= whole * (1 - 1e-9)
    return Check(
        f"ledger of {source}: all entries are accounted together",
        "ok" if holds else "failed",
        f"Expected epsilon {whole:.4f} of {len(history)} entries at delta {delta:g}, "
        f"the ledger states {spent:.4f}.",
        falsifies=not holds,
    )


def _nonces(source: str, entries: Sequence[Entry]) -> Check:
    """Without its nonce an acknowledged hash tells which data an entry speaks of."""
    nonces = [entry.nonce for entry in entries if len(entry.nonce) == _NONCE_DIGITS]
    fresh = len(set(nonces))
    return Check(
        f"ledger of {source}: what is acknowledged cannot be computed",
        "ok" if fresh == len(entries) else "failed",
        f"Expected {len(entries)} fresh nonces of 128 bits, found {fresh}.",
        falsifies=fresh < len(entries),
    )


def budget_check(state: Path, source: str, plan: Plan, noise: Randomness) -> Check:
    """Asks a client for one more run's round and says whether it refuses if it must.

    Args:
        state: of the client; nothing is released.
        source: whose ledger.
        plan: of both runs; its target is the budget.
        noise: of the kind that the ledger's releases had.
    """
    what = f"budget of {source}: a run past it is refused"
    entries = ledger_as_it_stands(state, source).entries
    history = [*(entry.composition for entry in entries), plan.composition()]
    reached = epsilon(history, plan.target_delta)
    if reached <= plan.target_epsilon:
        return Check(what, "unknown", f"One more round would reach only {reached:.4f}.")
    refused = _refuses(state, source, plan, noise)
    return Check(
        what,
        "ok" if refused else "failed",
        f"One more round would reach epsilon {reached:.4f} of {plan.target_epsilon:g}: "
        f"expected a refusal, got {'one' if refused else 'none'}.",
        falsifies=not refused,
    )


def _refuses(state: Path, source: str, plan: Plan, noise: Randomness) -> bool:
    with open_release(
        state, source, plan=plan, randomness=noise, backbone=""
    ) as release:
        try:
            release.authorise(Question(_ANOTHER_RUN, 1, ""))
        except PrivacyBudgetExceeded:
            return True
    return False


def noise_check(first: Randomness, second: Randomness) -> Check:
    """Compares the noise of two answers, and of parts of one, value by value."""
    drawn = [source.gaussian(_DRAWN) for source in (first, second)]
    parts = torch.cat(drawn).view(2 * _PARTS, -1)
    largest = float((parts.corrcoef() - torch.eye(2 * _PARTS)).abs().max())
    holds = largest < _MOST_CORRELATED
    return Check(
        "noise: no two answers and no two parts of one share it",
        "ok" if holds else "failed",
        f"Expected correlations within {_MOST_CORRELATED:g} of zero, found "
        f"{largest:.3f} between {2 * _PARTS} parts of {_DRAWN // _PARTS} values.",
        falsifies=not holds,
    )


def hiding_check(records: Sequence[Mapping[str, object]]) -> Check:
    """Looks for what a run publishes of cohorts that its guarantee hides.

    Args:
        records: the run's rounds, as in ``events.jsonl``, of a run of unit ``client``.
    """
    told = sorted(
        {name for record in records for name in _HIDDEN if record.get(name) is not None}
    )
    return Check(
        "cohorts: who answered, and how many, is not published",
        "failed" if told else "ok",
        f"Expected none of {', '.join(_HIDDEN)} in {len(records)} rounds, found "
        f"{', '.join(told) or 'none'}.",
        falsifies=bool(told),
    )
