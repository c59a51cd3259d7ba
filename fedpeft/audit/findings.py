"""Findings: three to five of an audit's results in plain words, each with advice.

The worst comes first. Every figure keeps the label of the column that it rests on, and
what was not found is never called absent: only what these attacks found at this size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from fedpeft.audit.gates import Verdict
from fedpeft.audit.reading import (
    headline,
    is_above_control,
    is_covered,
    ranked,
    setting_words,
)
from fedpeft.audit.results import AttackResult, Audit, Claim, Column, DpTrial
from fedpeft.audit.wording import (
    control_words,
    interval,
    metric_words,
    quantity,
    result_words,
    upper_epsilon,
)

MOST = 5
_NEAR = 0.95
"""Share of its target from which a budget counts as spent."""


@dataclass(frozen=True)
class Finding:
    """One result in words.

    Attributes:
        column: of evidence that it rests on.
        weight: ``grave``, ``notable`` or ``plain``.
        text: what was found.
        advice: what to do about it.
    """

    column: Column
    weight: Literal["grave", "notable", "plain"]
    text: str
    advice: str


def findings(audit: Audit, verdict: Verdict) -> list[Finding]:
    """Returns up to five findings, the worst first."""
    sources = (
        _refutations(audit),
        _missing_promise(audit),
        _noise(audit.claim),
        _leaks(audit),
        _failed_checks(audit),
        _budget(audit.claim),
        _trusted_server(audit.claim),
        _no_leak(audit),
        _trials(audit),
        _open_inputs(audit),
        _unmeasured(verdict),
    )
    everything = [finding for source in sources for finding in islice(source, 3)]
    order = ("grave", "notable", "plain")
    return sorted(everything, key=lambda each: order.index(each.weight))[:MOST]


def _refutations(audit: Audit) -> Iterator[Finding]:
    stop = "Release nothing more; mend what is named, and audit again."
    for trial in audit.dp_trials:
        if trial.falsified:
            yield Finding(
                "replay", "grave", f"The claim is refuted by {_trial(trial)}", stop
            )
    for check in audit.checks:
        if check.falsifies and check.status == "failed":
            text = f"The claim is refuted: {check.check}: {check.detail}"
            yield Finding("this-run", "grave", text, stop)


def _trial(trial: DpTrial) -> str:
    return f"the trial '{trial.trial}': {trial.detail}"


def _missing_promise(audit: Audit) -> Iterator[Finding]:
    if audit.claim is None:
        yield Finding(
            "this-run",
            "grave",
            "The run has no differential privacy: nothing bounds what updates reveal.",
            "Set [privacy] unit and target_epsilon; fedpeft budget says what it "
            "costs before anything runs.",
        )


def _noise(claim: Claim | None) -> Iterator[Finding]:
    if claim is not None and claim.noise == "seeded":
        yield Finding(
            "this-run",
            "grave",
            "The noise was seeded: whoever knows the seed can remove it, and then no "
            "epsilon holds.",
            "Set [privacy] noise = 'secure' for anything but tests.",
        )


def _leaks(audit: Audit) -> Iterator[Finding]:
    for result in ranked(audit.attacks):
        name = headline(result) or ""
        if not is_above_control(result, name):
            continue
        unit = result.units[name]
        found, control = result.metrics[name], result.prior_only.get(name)
        text = (
            f"{result_words(result)}: {metric_words(name)}: "
            f"{quantity(found.value, unit)} ({interval(found, unit)})"
        )
        if control is not None:
            beside = quantity(control.value, unit)
            text += f"; {control_words(result)} {beside}"
        advice = _remedy(audit, result) or _advice(audit.claim, result)
        yield Finding(result.column, "notable", f"{text}.", advice)


def _advice(claim: Claim | None, result: AttackResult) -> str:
    """Names what would protect against the adversary of an attack, unmeasured."""
    if claim is None:
        return "Set [privacy] unit and target_epsilon."
    if not is_covered(claim, result):
        return (
            f"Unit {claim.unit!r} trusts the server; [privacy] unit = 'example' or "
            "'person' protects against it."
        )
    return "Lower target_epsilon."


def _remedy(audit: Audit, result: AttackResult) -> str | None:
    """Names the smallest change that brought the attack to its control, as measured."""
    name = headline(result) or ""
    cells = [
        each
        for each in audit.surface
        if result_words(each) == result_words(result) and name in each.difference
    ]
    quiet = [cell for cell in cells if not is_above_control(cell, name)]
    if not quiet or len(quiet) == len(cells):
        return None

    def _leak(cell: AttackResult) -> float:
        return cell.difference[name].value

    worst = max(cells, key=_leak)

    def changed(cell: AttackResult) -> list[str]:
        return [
            setting_words(key, value)
            for key, value in cell.settings.items()
            if worst.settings.get(key) != value
        ]

    best = min(quiet, key=lambda each: (len(changed(each)), _leak(each)))
    after = quantity(best.metrics[name].value, best.units[name])
    return f"With {', '.join(changed(best))} it reached {after}: no more than control."


def _failed_checks(audit: Audit) -> Iterator[Finding]:
    for check in audit.checks:
        if check.status == "failed" and not check.falsifies:
            yield Finding(
                "this-run",
                "notable",
                f"Not in order: {check.check}: {check.detail}",
                "Find out why before the model is used.",
            )


def _budget(claim: Claim | None) -> Iterator[Finding]:
    if claim is None or math.isinf(claim.target_epsilon):
        return
    spent = (
        f"{upper_epsilon(claim.spent_epsilon)} of {upper_epsilon(claim.target_epsilon)}"
    )
    if claim.spent_epsilon > claim.target_epsilon:
        text = f"The worst client has spent epsilon {spent}: more than its target."
        advice = "Ask nothing more of it, and find out which runs it took part in."
        yield Finding("this-run", "grave", text, advice)
    elif claim.spent_epsilon >= _NEAR * claim.target_epsilon:
        text = f"The worst client has spent epsilon {spent}: its budget is used up."
        advice = "Plan no further run on the same data without a new decision."
        yield Finding("this-run", "plain", text, advice)


def _trusted_server(claim: Claim | None) -> Iterator[Finding]:
    if claim is not None and claim.holds_against == "everybody but the server":
        yield Finding(
            "this-run",
            "notable",
            "The guarantee does not hold against the server, which adds the noise.",
            "Choose [privacy] unit = 'example' or 'person' where the server is not "
            "trusted.",
        )


def _no_leak(audit: Audit) -> Iterator[Finding]:
    tried = ranked(audit.attacks)
    if not tried or any(is_above_control(each, headline(each) or "") for each in tried):
        return
    differences = [
        result.difference[name].high
        for result in tried
        for name in result.difference
        if result.units.get(name) == "share"
    ]
    text = f"None of the {len(tried)} attacks tried did better than"
    if len(tried) == 1:
        text = "The one attack tried did no better than"
    text += " its control"
    if differences:
        text += f"; 95 % upper limit {quantity(max(differences), 'share')} above it"
    advice = "This holds for these attacks at this size; audit again when either grows."
    yield Finding(tried[0].column, "plain", f"{text}.", advice)


def _trials(audit: Audit) -> Iterator[Finding]:
    names = list(dict.fromkeys(trial.trial for trial in audit.dp_trials))
    if names and not any(trial.falsified for trial in audit.dp_trials):
        yield Finding(
            "replay",
            "plain",
            f"{len(names)} kinds of trial with canaries tried to refute the claim, and "
            f"none did: {', '.join(names)}.",
            "What lies between the audited and the claimed epsilon was not tested; it "
            "is no room to spare.",
        )


def _open_inputs(audit: Audit) -> Iterator[Finding]:
    places = [each for each in audit.rank_budget if each.verdict == "exact"]
    if places:
        worst = max(places, key=lambda each: each.rows - each.needed)
        private = audit.claim is not None
        yield Finding(
            "this-run",
            "plain" if private else "notable",
            f"Whatever the data, the updates of {worst.place} show {worst.rows} "
            f"directions where {worst.needed} hold all inputs of a batch"
            f"{', under the noise' if private else ''}.",
            "Fewer rounds on the same data, or noise; a lower rank only delays it.",
        )


def _unmeasured(verdict: Verdict) -> Iterator[Finding]:
    for gate in verdict.lines:
        if gate.status == "inconclusive" and gate.column != "both":
            yield Finding(
                gate.column,
                "plain",
                f"Not settled: {gate.rule}. {gate.detail}",
                "Audit more clients or more canaries, or measure what is missing.",
            )
