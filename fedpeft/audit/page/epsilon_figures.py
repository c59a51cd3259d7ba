"""Pictures of the guarantee: epsilon from below and from above."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedpeft.audit.page.drawing import (
    INK,
    LINE,
    LOWER,
    QUIET,
    UPPER,
    Picture,
    Table,
    canvas,
    to_svg,
)
from fedpeft.audit.reading import deciding, headline_trial
from fedpeft.audit.results import BoundResult, Claim, Column, DpTrial
from fedpeft.audit.wording import UNKNOWN, lower_epsilon, upper_epsilon

_MOST_ROWS = 40
"""Of a table by client and round; beyond it only the worst client of each round."""


def epsilon_picture(claim: Claim | None, trials: Sequence[DpTrial]) -> Picture | None:
    """Draws the claimed epsilon and the one that the audit found, on one axis.

    None where nothing is claimed.
    """
    if claim is None:
        return None
    trial = headline_trial(trials)
    bound = deciding(trial) if trial else None
    spent = upper_epsilon(claim.spent_epsilon)
    words = f"At most epsilon {spent} is claimed"
    rows = [
        ("Claimed, spent", spent, "this run"),
        ("Target", upper_epsilon(claim.target_epsilon), "this run"),
    ]
    if trial is None or bound is None:
        words += "; no lower bound was measured."
    else:
        words += f"; canaries show at least {lower_epsilon(bound.epsilon)}"
        if trial.epsilon_upper < 0.999 * claim.spent_epsilon:
            words += f" of the {upper_epsilon(trial.epsilon_upper)} of that trial"
        words += f", and could have shown {lower_epsilon(bound.ceiling)}."
        found = f"{lower_epsilon(bound.epsilon)} (alpha {bound.alpha:.2g})"
        rows.append((f"Audited lower bound ({bound.bound})", found, "replay"))
        rows.append(("Its ceiling", lower_epsilon(bound.ceiling), "replay"))
    with canvas(1.16 if bound else 0.76) as (figure, axes):
        _bars(axes, claim.spent_epsilon, bound)
        svg = to_svg(figure, "epsilon", words)
    table = Table(("Epsilon", "Value", "Evidence"), tuple(rows))
    columns: tuple[Column, ...] = ("this-run", "replay") if bound else ("this-run",)
    return Picture("epsilon", columns, words, svg, table)


def _bars(axes: Axes, spent: float, bound: BoundResult | None) -> None:
    """Draws one bar from above and, below it, one from below with its ceiling."""
    ends = [spent, bound.ceiling, bound.epsilon] if bound else [spent]
    most = max([end for end in ends if math.isfinite(end)], default=1.0) or 1.0
    axes.barh(0, min(spent, 1.1 * most), height=0.34, color=UPPER)
    axes.text(0, 0.24, f"Claimed, at most {upper_epsilon(spent)} (this run)")
    if bound:
        axes.barh(-1, bound.epsilon, height=0.34, color=LOWER)
        found = lower_epsilon(bound.epsilon)
        axes.text(0, -0.76, f"Audited, at least {found} (replay)")
    if bound and math.isfinite(bound.ceiling):
        axes.plot(2 * [bound.ceiling], [-1.26, -0.74], color=INK, linewidth=1.5)
        # Beside its line, where the words of the bar do not reach.
        beside = bound.ceiling + 0.015 * most
        axes.text(beside, -1.0, "ceiling", color=QUIET, va="center")
    bottom = -1.4 if bound else -0.4
    axes.set(xlim=(0, 1.16 * most), ylim=(bottom, 0.58), yticks=[])
    axes.set_xlabel("epsilon", loc="right", labelpad=1)


def rounds_picture(trials: Sequence[DpTrial]) -> Picture | None:
    """Draws epsilon from below and above, by client and round."""
    found = [
        (trial, trial.server_round, bound)
        for trial in trials
        if trial.server_round is not None and (bound := deciding(trial)) is not None
    ]
    if not found:
        return None
    found.sort(key=lambda each: (each[1], each[0].client or 0))
    broken = sum(trial.falsified for trial, *_ in found)
    words = (
        f"In {broken} of {len(found)} tests the claim is refuted."
        if broken
        else f"In none of {len(found)} tests the claim is refuted."
    )
    with canvas(2.6) as (figure, axes):
        _rounds(axes, found)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3
        )
        svg = to_svg(figure, "rounds", words)
    shown, note = found, ""
    if len(found) > _MOST_ROWS:
        worst = {each[1]: each for each in sorted(found, key=lambda e: e[2].epsilon)}
        shown = [worst[number] for number in sorted(worst)]
        note = "The worst client of each round; all are in report.json."
    header = ("Round", "Client", "At least", "Ceiling", "At most", "Canaries", "Test")
    rows = tuple(
        (
            str(number),
            UNKNOWN if trial.client is None else str(trial.client),
            lower_epsilon(bound.epsilon),
            lower_epsilon(bound.ceiling),
            upper_epsilon(trial.epsilon_upper),
            f"{trial.canaries:,}",
            "refuted" if trial.falsified else "stands",
        )
        for trial, number, bound in shown
    )
    return Picture("rounds", ("replay",), words, svg, Table(header, rows), note)


def _rounds(axes: Axes, found: Sequence[tuple[DpTrial, int, BoundResult]]) -> None:
    numbers = sorted({number for _, number, _ in found})
    upper = [
        max(t.epsilon_upper for t, number, _ in found if number == each)
        for each in numbers
    ]
    ceiling = [max(b.ceiling for _, n, b in found if n == each) for each in numbers]
    axes.plot(numbers, upper, color=UPPER, marker="v", ms=4, label="claimed, at most")
    axes.plot(numbers, ceiling, color=QUIET, linestyle="--", label="ceiling")
    axes.plot(
        [number for _, number, _ in found],
        [bound.epsilon for *_, bound in found],
        "o",
        color=LOWER,
        markerfacecolor="none",
        markersize=4.5,
        label="audited, at least",
    )
    axes.set_xlabel("round", loc="right", labelpad=1)
    axes.set_ylabel("epsilon", color=QUIET)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", linewidth=0.5, color=LINE)
