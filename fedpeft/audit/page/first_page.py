"""What the first page says: the whole audit for a reader who reads no code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedpeft.audit.gates import Gate, Verdict
from fedpeft.audit.reading import headline, is_covered, ranked
from fedpeft.audit.results import AttackResult, Audit, Column, Estimate
from fedpeft.audit.wording import (
    adversary_words,
    control_words,
    interval,
    metric_words,
    percent,
    quantity,
    result_words,
    unit_words,
)

_MINE = {"person": "your records", "client": "your client"}
_PASSIVE = "ABCDE"
_ROUNDING = 1 + 1e-9
_MOST_GATES = 6
_MOST_LIMITS = 4

OUTCOMES = {
    "pass": ("Pass", "Every line of the policy is met, and nothing refutes the claim."),
    "leakage": ("Fail", "The audit found more leakage than the policy allows."),
    "falsified": ("Fail", "The claimed privacy guarantee is refuted."),
    "inconclusive": ("Inconclusive", "Not every line of the policy could be settled."),
}
"""Outcome -> a word, and a sentence."""


@dataclass(frozen=True)
class Odds:
    """How often an adversary picks the right record among several.

    Attributes:
        mine: whose record, to the reader.
        among: how many.
        theory: the most that the claimed epsilon allows; None if nothing is claimed.
        guessing: one in so many.
        measured: with its interval, in words; None if it was not measured.
        unmeasured: why not, in words; empty if it was.
        column: of the measurement.
        is_exceeded: whether the theory is of this run, and others come on top.
    """

    mine: str
    among: int
    theory: str | None
    guessing: str
    measured: str | None
    unmeasured: str
    column: Column | None
    is_exceeded: bool


@dataclass(frozen=True)
class Reconstruction:
    """The worst reconstruction, beside its controls: words and (name, figure) rows."""

    name: str
    column: Column
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FirstPage:
    """All of it, in words; ids of `outcome` and `kind` choose colour and sign."""

    outcome: str
    kind: Literal["pass", "fail", "inconclusive"]
    word: str
    sentence: str
    counts: str
    model: str
    protected: str
    adversary: str
    odds: Odds
    reconstruction: Reconstruction | None
    gates: tuple[Gate, ...]
    more_gates: int
    limitations: tuple[str, ...]
    more_limitations: int
    invalid: tuple[str, ...]


def first_page(audit: Audit, verdict: Verdict) -> FirstPage:
    """Returns what the first page says."""
    word, sentence = OUTCOMES[verdict.outcome]
    kinds: dict[str, Literal["pass", "fail", "inconclusive"]] = {
        "Pass": "pass",
        "Fail": "fail",
        "Inconclusive": "inconclusive",
    }
    order = ("fail", "inconclusive", "pass", "not-claimed")
    gates = sorted(verdict.lines, key=lambda gate: order.index(gate.status))
    return FirstPage(
        outcome=verdict.outcome,
        kind=kinds[word],
        word=word,
        sentence=sentence,
        counts=_counts(verdict),
        model=_model(audit),
        protected=unit_words(audit.claim),
        adversary=_adversary(audit),
        odds=odds(audit),
        reconstruction=_reconstruction(audit),
        gates=(verdict.claim, *gates[:_MOST_GATES]),
        more_gates=max(0, len(gates) - _MOST_GATES),
        limitations=audit.limitations[:_MOST_LIMITS],
        more_limitations=max(0, len(audit.limitations) - _MOST_LIMITS),
        invalid=_invalid(audit),
    )


def odds(audit: Audit) -> Odds:
    """Returns the odds of picking a record, measured by the attack that did best.

    Of those that the claim speaks of: beside what others did, its bound would mislead.
    """
    name = "identification_top1"
    claim = audit.claim
    tried = [each for each in audit.attacks if name in each.metrics]
    found = [each for each in tried if claim is None or is_covered(claim, each)]
    best = max(found, key=lambda each: each.metrics[name].value, default=None)
    bounds = {} if claim is None else claim.largest_success
    among = _among(audit, best, name) or max(bounds, default=1000)
    # Fewer to choose from are no harder: what bounds their odds bounds these.
    nearest = max((number for number in bounds if number <= among), default=None)
    return Odds(
        mine=_MINE.get(claim.unit if claim else "", "your record"),
        among=among,
        theory=None if nearest is None else percent(bounds[nearest]),
        guessing=percent(1 / among),
        measured=None if best is None else _words(best.metrics[name], "share"),
        unmeasured="" if best else _unmeasured(bool(tried)),
        column=None if best is None else best.column,
        is_exceeded=claim is not None
        and claim.spent_epsilon > claim.planned_epsilon * _ROUNDING,
    )


def _unmeasured(was_tried: bool) -> str:
    if was_tried:
        return "not measured by any attack that this bound covers"
    return "not measured: no such attack was run"


def _among(audit: Audit, result: AttackResult | None, name: str) -> int | None:
    """Returns among how many the right record was, or None if nothing says so."""
    decoys = audit.provenance.get("decoys")
    if result is not None and isinstance(decoys, int):
        return decoys + 1
    guess = result.baseline.get(name) if result is not None else None
    if guess is not None and 0 < guess.low == guess.high <= 1:  # chance, not measured
        return round(1 / guess.value)
    section = audit.config.get("audit")
    asked = section.get("decoys") if isinstance(section, Mapping) else None
    return asked + 1 if result is not None and isinstance(asked, int) else None


def _reconstruction(audit: Audit) -> Reconstruction | None:
    worst = next(
        (each for each in ranked(audit.attacks) if each.threat.goal == "reconstruct"),
        None,
    )
    if worst is None:
        return None
    metric = headline(worst) or ""
    named = (
        ("The attack", worst.metrics),
        (f"The same {control_words(worst)}", worst.prior_only),
        ("Best guess without any update", worst.baseline),
    )
    rows = tuple(
        (name, _words(estimates[metric], worst.units[metric]))
        for name, estimates in named
        if metric in estimates
    )
    name = f"{result_words(worst)}: {metric_words(metric)}"
    return Reconstruction(name, worst.column, rows)


def _words(found: Estimate, unit: str) -> str:
    return f"{quantity(found.value, unit)} ({interval(found, unit)})"


def _counts(verdict: Verdict) -> str:
    statuses = [gate.status for gate in verdict.lines]
    counted = [
        f"{statuses.count(status)} {word}"
        for status, word in (
            ("fail", "fail"),
            ("inconclusive", "inconclusive"),
            ("pass", "pass"),
        )
        if status in statuses
    ]
    return f"Policy lines: {', '.join(counted) or 'none'}."


def _model(audit: Audit) -> str:
    system = audit.system
    parts = [system.get(key) for key in ("backbone", "method", "task")]
    return ", ".join(str(part) for part in parts if part)


def _adversary(audit: Audit) -> str:
    threats = {each.threat for each in audit.attacks if each.misfit is None}
    passive = [each for each in threats if each.adversary in _PASSIVE]
    active = sorted({each.adversary for each in threats} - set(_PASSIVE))
    order = ("final-model", "aggregate", "update", "updates")
    words = "none: no attack was run"
    if passive:
        most = max(passive, key=lambda each: (each.adversary, order.index(each.access)))
        words = f"{adversary_words(most)} ({most.adversary} in section B)"
    elif active:
        words = "none that only looks on"
    if active:
        letters = " and ".join(active)
        words += f"; beside it one that changes what clients are sent ({letters})"
    return words[:1].upper() + words[1:]


def _invalid(audit: Audit) -> tuple[str, ...]:
    """Returns after which changes the report says nothing any more."""
    rounds = audit.federation.get("rounds")
    more = f"more than {rounds} rounds, or " if rounds else ""
    conditions = [
        f"Another configuration than {audit.config_hash[:12]}, backbone or version.",
        f"Further training on the same data: {more}another run of the same clients.",
    ]
    if audit.claim is not None:
        conditions.append(
            "One person's records at several clients: epsilon is that of one client."
        )
    if audit.claim is not None and audit.claim.noise == "seeded":
        conditions.append("A noise seed known to anybody.")
    conditions.append("Stronger attacks than those listed in section B.")
    return tuple(conditions)
