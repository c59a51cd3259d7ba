"""Gates: a policy held against an audit, line by line, and the exit code that follows.

What was not measured, or not well enough, is inconclusive; that is never a pass. A line
passes if the whole interval of a figure lies within its limit, fails if the whole
interval lies beyond, and is inconclusive in between.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fedpeft.audit.intervals import fewest_victims
from fedpeft.audit.policy import ANY, Line, Policy, fits
from fedpeft.audit.reading import deciding, headline_trial
from fedpeft.audit.results import (
    AttackResult,
    Audit,
    Check,
    Claim,
    Column,
)
from fedpeft.audit.wording import (
    interval,
    lower_epsilon,
    metric_words,
    number,
    quantity,
    result_words,
    upper_epsilon,
)
from fedpeft.wording import nearest

Status = Literal["pass", "fail", "inconclusive", "not-claimed"]

EXIT_CODES = {"pass": 0, "leakage": 1, "falsified": 2, "inconclusive": 3}
"""What each outcome ends the command with; 4 is any error."""

CLAIM_RULE = "The claimed guarantee is not refuted"


@dataclass(frozen=True)
class Gate:
    """One demand, judged.

    Attributes:
        column: of evidence that it rests on; ``both`` for the claim alone.
        subject: what the demand is about, as the policy names it; ``claim`` for the
            claim as a whole.
        rule: the demand in words.
        limit: as the policy names it; None for a check.
        observed: the figure, or the word, that was found; None if there was none.
        low: lower 95 % limit of an observed estimate, None for other figures.
        high: upper one.
        status: ``not-claimed`` for the claim of a run that makes none.
        detail: one sentence: what was found, and what would settle it.
    """

    column: Column | Literal["both"]
    subject: str
    rule: str
    limit: float | str | None
    observed: float | str | None
    low: float | None
    high: float | None
    status: Status
    detail: str


@dataclass(frozen=True)
class Verdict:
    """All gates of an audit: the claim's own, and one a line of the policy."""

    policy: str
    claim: Gate
    lines: tuple[Gate, ...]

    @property
    def gates(self) -> tuple[Gate, ...]:
        """All of them, the claim's own first."""
        return (self.claim, *self.lines)

    @property
    def outcome(self) -> Literal["pass", "leakage", "falsified", "inconclusive"]:
        """A falsified claim weighs most, then leakage, then what is not known."""
        if self.claim.status == "fail":
            return "falsified"
        found = {gate.status for gate in self.gates}
        if "fail" in found:
            return "leakage"
        return "inconclusive" if "inconclusive" in found else "pass"

    @property
    def exit_code(self) -> int:
        """What the command ends with, see :data:`EXIT_CODES`."""
        return EXIT_CODES[self.outcome]


def judge_policy(policy: Policy, audit: Audit) -> Verdict:
    """Holds a policy against an audit."""
    gates = tuple(_gate(line, audit) for line in policy.lines)
    return Verdict(policy.name, judge_claim(audit), gates)


def judge_claim(audit: Audit) -> Gate:
    """Judges the guarantee itself, by deciding tests alone; bounds only shown do not.

    It is refuted by one falsified trial or one failed check that falsifies. It is
    inconclusive if nothing was tried against it, or such a check could not be made.
    """
    trials = audit.dp_trials
    checks = [check for check in audit.checks if check.falsifies]
    refuting = [f"Replay: {trial.detail}" for trial in trials if trial.falsified]
    refuting += [f"This run: {c.detail}" for c in checks if c.status == "failed"]
    open_checks = [check.check for check in checks if check.status == "unknown"]
    status: Status = "pass"
    tried = f"{len(trials)} trials (replay) and {len(checks)} checks (this run)"
    detail = f"{tried}; none refutes it. {_reach(audit)}"
    if refuting:
        status, detail = "fail", " ".join(refuting)
    elif audit.claim is None:
        status, detail = "not-claimed", "The run has no differential privacy."
    elif not trials and not checks:
        status, detail = "inconclusive", "Nothing was tried against it."
    elif open_checks:
        status = "inconclusive"
        detail = f"Could not be checked: {', '.join(open_checks)}."
    return Gate("both", "claim", CLAIM_RULE, None, None, None, None, status, detail)


def _reach(audit: Audit) -> str:
    """Says how much could have been shown: a short trial refutes little."""
    trial = headline_trial(audit.dp_trials)
    bound = deciding(trial) if trial else None
    if trial is None or bound is None:
        return "No trial could have shown any epsilon."
    most, claimed = lower_epsilon(bound.ceiling), upper_epsilon(trial.epsilon_upper)
    return f"What is nearest to a whole run could have shown {most} of {claimed}."


def _gate(line: Line, audit: Audit) -> Gate:
    if line.check is not None:
        return _check_gate(line, line.check, audit)
    subject, _, name = (line.metric or "").partition(".")
    if subject == "claim":
        return _claim_gate(line, name, audit.claim)
    return _attack_gate(line, subject, name, audit)


def _check_gate(line: Line, pattern: str, audit: Audit) -> Gate:
    found = [check for check in audit.checks if fits(pattern, check.check)]
    if not found:
        near = nearest(pattern, [check.check for check in audit.checks])
        detail = f"No such check was made{near}".rstrip(".") + "."
        return _bare(line, "inconclusive", detail)
    meanings: dict[str, Status] = {"failed": "fail", "unknown": "inconclusive"}
    for status, meaning in meanings.items():
        worst = [check for check in found if check.status == status]
        if worst:
            return _bare(line, meaning, _listed(worst), status)
    count = f"{len(found)} check{'s' * (len(found) > 1)} in order."
    return _bare(line, "pass", count, "ok")


def _listed(checks: list[Check]) -> str:
    return " ".join(f"{check.check}: {check.detail}" for check in checks)


def _claim_gate(line: Line, name: str, claim: Claim | None) -> Gate:
    if claim is None:
        return _bare(line, "fail", "The run has no differential privacy.", "unbounded")
    field, _, among = name.partition(".")
    observed = getattr(claim, field)
    if among:
        observed = observed.get(int(among))
    if observed is None:
        return _bare(line, "inconclusive", f"Nothing is known of {name}.")
    if line.equals is not None:
        kept = str(observed) == line.equals
        return _bare(line, "pass" if kept else "fail", f"Found {observed}.", observed)
    if not isinstance(observed, int | float) or math.isnan(observed):
        return _bare(line, "inconclusive", f"Found {observed}, no number.")
    assert line.at_most is not None
    status: Status = "pass" if observed <= line.at_most else "fail"
    is_epsilon = field.endswith("epsilon")
    shown = upper_epsilon(observed) if is_epsilon else number(observed)
    return _bare(line, status, f"Found {shown}.", float(observed))


def _attack_gate(line: Line, attack: str, metric: str, audit: Audit) -> Gate:
    results = [result for result in audit.attacks if result.column == line.column]
    if attack != ANY:
        results = [result for result in results if result.attack == attack]
    gates = [
        _estimate_gate(line, result, name) for result, name in _named(results, metric)
    ]
    if gates:
        return max(gates, key=_severity)
    return _bare(line, "inconclusive", _why_not(results, metric))


def _named(
    results: list[AttackResult], metric: str
) -> Iterator[tuple[AttackResult, str]]:
    """Yields what a metric's pattern means; what lies open is no attack on a record."""
    for result in results:
        for name in result.metrics:
            is_share = result.units.get(name) == "share"
            exposed = result.threat.goal == "expose"
            if metric == name or (metric == ANY and is_share and not exposed):
                yield result, name


def _why_not(results: list[AttackResult], metric: str) -> str:
    if not results:
        return "Not measured: no such attack was run in this column of evidence."
    misfits = [result.misfit for result in results if result.misfit]
    if misfits:
        return f"Not measured: {misfits[0]}."
    known = {name for result in results for name in result.metrics}
    return f"Not measured{nearest(metric, known)}".rstrip(".") + "."


def _estimate_gate(line: Line, result: AttackResult, name: str) -> Gate:
    unit = result.units.get(name, "")
    leak = line.leak_at_most is not None
    limit = line.leak_at_most if leak else line.at_most
    assert limit is not None
    found = (result.difference if leak else result.metrics).get(name)
    what = f"{result_words(result)}, {metric_words(name)}"
    if found is None:
        return _bare(line, "inconclusive", f"{what} has no prior-only control.")
    status: Status = "inconclusive"
    if found.low > limit:
        status = "fail"
    elif found.high <= limit:
        status = "pass"
    shown = f"{quantity(found.value, unit)} ({interval(found, unit)})"
    detail = f"{what}: {shown}{' above control' if leak else ''}."
    if status == "inconclusive" and unit == "share" and found.value <= limit:
        detail += _too_few(result.victims, limit)
    return Gate(
        line.column,
        line.subject,
        line.rule,
        limit,
        found.value,
        found.low,
        found.high,
        status,
        detail,
    )


def _too_few(victims: int, limit: float) -> str:
    """Says what a limit takes, if there were too few to pass it whatever they showed.

    An interval allows for a share of victims that were not seen.
    """
    needed = fewest_victims(limit)
    if needed is None:
        return f" There were {victims} victims; not even a million meet this limit."
    if victims >= needed:
        return ""
    return (
        f" There were {victims} victims; this limit takes at least {needed:,}, even "
        "where none leaks anything."
    )


def _severity(gate: Gate) -> tuple[int, float]:
    order = ("pass", "inconclusive", "fail").index(gate.status)
    return order, -math.inf if gate.high is None else gate.high


def _bare(
    line: Line, status: Status, detail: str, observed: float | str | None = None
) -> Gate:
    limit = next(
        (x for x in (line.at_most, line.leak_at_most, line.equals) if x is not None),
        None,
    )
    return Gate(
        line.column,
        line.subject,
        line.rule,
        limit,
        observed,
        None,
        None,
        status,
        detail,
    )
