"""Pictures of attacks: each figure beside its two controls."""

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedpeft.audit.page.drawing import (
    LOWER,
    QUIET,
    UPPER,
    Picture,
    Table,
    canvas,
    to_svg,
)
from fedpeft.audit.reading import difference_words, is_above_control
from fedpeft.audit.results import AttackResult, Column, Estimate
from fedpeft.audit.wording import (
    UNKNOWN,
    interval,
    metric_words,
    quantity,
    result_words,
)

_Rows = Sequence[tuple[AttackResult, str]]


def attack_pictures(results: Iterable[AttackResult]) -> list[Picture]:
    """Draws every metric beside its controls: a picture a column and unit."""
    groups: dict[tuple[Column, str], list[tuple[AttackResult, str]]] = {}
    for result in results:
        for name, unit in result.units.items():
            if name in result.metrics:
                groups.setdefault((result.column, unit), []).append((result, name))
    order = {"share": 0, "dB": 1, "bits": 2}
    keys = sorted(groups, key=lambda key: (key[0], order.get(key[1], 3)))
    return [_forest(column, unit, groups[column, unit]) for column, unit in keys]


def _forest(column: Column, unit: str, rows: _Rows) -> Picture:
    name = f"attacks-{column}-{unit or 'number'}"
    above = [
        f"{result_words(result)} ({metric})"
        for result, metric in rows
        if is_above_control(result, metric)
    ]
    if above:
        words = f"Above its control: {', '.join(above)}."
    else:
        words = "No figure is above its control."
    with canvas(0.75 + 0.4 * len(rows)) as (figure, axes):
        scale = 100.0 if unit == "share" else 1.0
        across = axes.get_yaxis_transform()
        for place, (result, metric) in enumerate(rows):
            axes.text(
                0, 0.22 - place, _short_name(rows, result, metric), transform=across
            )
            _marks(axes, -place, scale, result, metric)
        if unit == "share":
            axes.set_xlim(-2, 102)
        axes.set(yticks=[], ylim=(0.6 - len(rows), 0.75))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel({"share": "%"}.get(unit, unit), loc="right", labelpad=1)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3
        )
        svg = to_svg(figure, name, words)
    return Picture(name, (column,), words, svg, _attack_table(unit, rows))


def _short_name(rows: _Rows, result: AttackResult, metric: str) -> str:
    return f"{result_words(result)}: {metric}{_variant(rows, result)}"


def _variant(rows: _Rows, result: AttackResult) -> str:
    """Tells results of the same attack apart."""
    words = difference_words(result, [each for each, _ in rows])
    return f" ({words})" if words else ""


def _marks(
    axes: Axes, height: int, scale: float, result: AttackResult, metric: str
) -> None:
    marks = (
        ("the attack", result.metrics, 0.06, LOWER, "o", LOWER),
        ("its control", result.prior_only, -0.1, UPPER, "D", "none"),
        ("best guess", result.baseline, -0.26, QUIET, "|", QUIET),
    )
    for name, estimates, shift, colour, marker, face in marks:
        found = estimates.get(metric)
        if found is None or not math.isfinite(found.value):
            continue
        place, shown = height + shift, scale * found.value
        ends = [scale * found.low, scale * found.high]
        if all(math.isfinite(end) for end in ends):  # else the table says so
            axes.plot(ends, 2 * [place], color=colour, lw=1.2)
        axes.plot(
            shown,
            place,
            marker,
            color=colour,
            markerfacecolor=face,
            markersize=4.5,
            linestyle="none",
            label=name if height == 0 else None,
        )


def _attack_table(unit: str, rows: _Rows) -> Table:
    header = (
        "Attack and figure",
        "Attack",
        "Control",
        "Best guess",
        "Leak",
        "n",
    )
    return Table(
        header,
        tuple(
            (
                f"{result_words(result)}: {metric_words(metric)}"
                f"{_variant(rows, result)}",
                *(
                    _cell(estimates.get(metric), unit)
                    for estimates in (
                        result.metrics,
                        result.prior_only,
                        result.baseline,
                        result.difference,
                    )
                ),
                f"{result.records:,}",
            )
            for result, metric in rows
        ),
    )


def _cell(found: Estimate | None, unit: str) -> str:
    if found is None or math.isnan(found.value):
        return UNKNOWN
    return f"{quantity(found.value, unit)}\n{interval(found, unit)}"
