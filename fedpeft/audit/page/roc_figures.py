"""Pictures of membership attacks: members found against false alarms, both logarithmic.

Source: Carlini et al. (2022), Membership inference attacks from first principles,
arXiv:2112.03570, section IV: an attack counts by what it finds at few false alarms.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from fedpeft.audit.page.drawing import (
    LINE,
    LOWER,
    QUIET,
    UPPER,
    Picture,
    Table,
    canvas,
    to_svg,
)
from fedpeft.audit.page.spread_figures import title
from fedpeft.audit.results import AttackResult, Estimate
from fedpeft.audit.wording import UNKNOWN, control_words, interval, percent

_RATES = {0.1: "", 0.01: "tpr_at_fpr_1e-2", 0.001: "tpr_at_fpr_1e-3"}
"""Rate of false alarms -> the metric that says, with an interval, what is found."""

_ROUNDING = 1e-9


def roc_pictures(
    results: Sequence[AttackResult], non_members: int | None = None
) -> list[Picture]:
    """Draws each membership attack's curve, its control's and a coin's.

    A member's AUC is 1 less the share of non-members at or above it, ties half: so the
    values of all members are the whole curve.

    Args:
        results: of all attacks; those without a value a member are left out.
        non_members: of whom each client's members are told apart; None if not known.
    """
    return [
        _picture(result, f"roc-{place}-{result.attack}", results, non_members)
        for place, result in enumerate(results)
        if result.values.get("auc")
    ]


def _picture(
    result: AttackResult,
    name: str,
    others: Sequence[AttackResult],
    non_members: int | None,
) -> Picture:
    own, control = (
        sorted(1 - value for value in values.get("auc", ()))
        for values in (result.values, result.control_values)
    )
    finest = _resolution([*own, *control], non_members)
    rates = [
        rate
        for rate, metric in _RATES.items()
        if (metric in result.metrics if metric else rate >= finest)
    ]
    rate = min(rates, default=max(0.1, finest))
    words = (
        f"{title(result, others)}: at {percent(rate)} false alarms it finds "
        f"{_words(_at(result.metrics, own, rate))} of the members, "
        f"{control_words(result)} {_words(_at(result.prior_only, control, rate))}; "
        f"a coin {percent(rate)}."
    )
    with canvas(2.6) as (figure, axes):
        _draw(axes, own, control, finest)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3
        )
        svg = to_svg(figure, name, words)
    rows = tuple(
        (
            percent(each),
            *(
                _cell(_at(estimates, sample, each)) if each in rates else UNKNOWN
                for estimates, sample in (
                    (result.metrics, own),
                    (result.prior_only, control),
                )
            ),
        )
        for each in _RATES
    )
    note = (
        "Every client has a threshold of its own: a member is compared with the "
        "non-members asked about beside it. Where there is a dash, these are too few."
    )
    table = Table(("False alarms", "Attack", "Control"), rows)
    return Picture(name, (result.column,), words, svg, table, note)


def _resolution(rates: Sequence[float], non_members: int | None) -> float:
    """Returns the smallest rate of false alarms that there is anything to say about."""
    if non_members:
        return 1 / non_members
    return min((rate for rate in rates if rate > _ROUNDING), default=0.1)


def found_at(rates: Sequence[float], rate: float) -> float:
    """Returns the share of members found at so many false alarms.

    >>> found_at([0.0, 0.01, 0.2, 0.7], 0.1)
    0.5

    Args:
        rates: one a member: of the false alarms at which it is found.
        rate: that is allowed.
    """
    return sum(each <= rate + _ROUNDING for each in rates) / max(1, len(rates))


def _at(
    estimates: dict[str, Estimate], rates: Sequence[float], rate: float
) -> Estimate | float:
    """Returns what the attack stated, with an interval, or what the curve shows."""
    return estimates.get(_RATES.get(rate, "")) or found_at(rates, rate)


def _words(found: Estimate | float) -> str:
    return percent(found.value if isinstance(found, Estimate) else found)


def _cell(found: Estimate | float) -> str:
    limits = f"\n{interval(found, 'share')}" if isinstance(found, Estimate) else ""
    return _words(found) + limits


def _draw(
    axes: Axes, own: Sequence[float], control: Sequence[float], finest: float
) -> None:
    marks = (
        ("the attack", own, LOWER, "-", 1.8),
        ("its control", control, UPPER, "--", 1.4),
    )
    for name, rates, colour, line, width in marks:
        if not rates:
            continue
        steps = sorted({finest, 1.0, *(rate for rate in rates if rate > finest)})
        # Nothing found has no place on a logarithmic axis.
        heights = [found_at(rates, step) or math.nan for step in steps]
        axes.step(
            steps,
            heights,
            where="post",
            color=colour,
            linestyle=line,
            linewidth=width,
            label=name,
        )
    axes.plot([finest, 1], [finest, 1], ":", color=QUIET, linewidth=1.2, label="a coin")
    axes.set(xscale="log", yscale="log", xlim=(finest, 1.05), ylim=(finest, 1.1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(linewidth=0.5, color=LINE)
    axes.set_axisbelow(True)
    axes.set_xlabel("false alarms", loc="right", labelpad=1)
    axes.set_ylabel("members found")
