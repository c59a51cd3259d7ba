"""How an audit is read: which of its figures speak for the rest."""

import math
from collections.abc import Iterable, Sequence

from fedpeft.audit.results import AttackResult, BoundResult, Claim, DpTrial
from fedpeft.audit.wording import plain

_MUCH = {"dB": 30.0, "bits": 20.0}


def is_covered(claim: Claim, result: AttackResult) -> bool:
    """Whether a claim speaks of what an attack was shown.

    Unit ``client`` is protected by the server, which itself sees single updates.
    """
    return claim.unit != "client" or result.threat.access not in ("update", "updates")


def headline(result: AttackResult) -> str | None:
    """Returns the name of an attack's first metric that has a control."""
    measured = [name for name in result.units if name in result.metrics]
    controlled = [name for name in measured if name in result.difference]
    return next(iter((*controlled, *measured)), None)


def is_above_control(result: AttackResult, metric: str) -> bool:
    """Whether the whole interval of the difference to the control is positive."""
    return metric in result.difference and result.difference[metric].low > 0


def ranked(results: Iterable[AttackResult]) -> list[AttackResult]:
    """Returns attacks on records, the worst first; those that did not fit are left out.

    Differences are compared in units of what would be much: a share of 1, 30 dB,
    20 bits.
    """
    tried = [each for each in results if each.misfit is None and headline(each)]
    return sorted(
        (each for each in tried if each.threat.goal != "expose"),
        key=_excess,
        reverse=True,
    )


def _excess(result: AttackResult) -> float:
    name = headline(result) or ""
    found = result.difference.get(name)
    if found is None or math.isnan(found.low):
        return -math.inf
    return found.low / _MUCH.get(result.units[name], 1.0)


def varied(results: Sequence[AttackResult]) -> list[str]:
    """Returns the settings that differ between results, the most varied first."""
    keys = {key for result in results for key in result.settings}
    counts = {
        key: len({str(result.settings.get(key)) for result in results}) for key in keys
    }
    different = [key for key in keys if counts[key] > 1]
    return sorted(different, key=lambda key: (-counts[key], key))


def setting_words(key: str, value: object) -> str:
    """Returns a setting with the last part of its key.

    >>> setting_words("training.local_steps", 5)
    'local steps 5'
    """
    return f"{key.rpartition('.')[2].replace('_', ' ')} {plain(value)}"


def difference_words(result: AttackResult, others: Sequence[AttackResult]) -> str:
    """Returns what tells a result from others of the same attack; empty if alone."""
    same = [each for each in others if each.attack == result.attack]
    return ", ".join(
        setting_words(key, result.settings[key])
        for key in varied(same)
        if key in result.settings
    )


def deciding(trial: DpTrial) -> BoundResult | None:
    """Returns the bound that a trial stands for; None if it has estimates alone."""
    return next((bound for bound in trial.bounds if not bound.is_estimate), None)


def headline_trial(trials: Sequence[DpTrial]) -> DpTrial | None:
    """Returns the trial that says most about the whole claim.

    A falsified one first; else the one whose claim is largest, which is the one nearest
    to a whole run, and of these the one with the largest bound.
    """

    def order(trial: DpTrial) -> tuple[bool, float, float]:
        bound = deciding(trial)
        return trial.falsified, trial.epsilon_upper, bound.epsilon if bound else -1.0

    bounded = [trial for trial in trials if deciding(trial)]
    return max(bounded or trials, key=order, default=None)
