"""Pictures of single records: how far some fare worse than the average.

Average and largest risk are both asked for by ISO/IEC 27559:2022, clause 7.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedpeft.audit.page.drawing import (
    INK,
    LINE,
    LOWER,
    PAPER,
    UPPER,
    Picture,
    Table,
    canvas,
    to_svg,
)
from fedpeft.audit.reading import difference_words, headline
from fedpeft.audit.results import AttackResult, Column
from fedpeft.audit.wording import (
    control_words,
    interval,
    metric_words,
    quantity,
    result_words,
)

_BINS = 20
_FEWEST = 5
"""Victims of a class that has a row of its own."""


def spread_pictures(results: Sequence[AttackResult]) -> list[Picture]:
    """Draws how each attack's headline is spread over records, and its control.

    Where every value is 0 or 1 there is none: a share says all there is.
    """
    return [
        _spread(result, metric, f"spread-{place}-{result.attack}", results)
        for place, result in enumerate(results)
        if (metric := headline(result)) and _has_spread(result, metric)
    ]


def _has_spread(result: AttackResult, metric: str) -> bool:
    values = {*result.values.get(metric, ()), *result.control_values.get(metric, ())}
    return not values <= {0.0, 1.0}


def _spread(
    result: AttackResult, metric: str, name: str, others: Sequence[AttackResult]
) -> Picture:
    unit = result.units[metric]
    own = _sorted(result.values.get(metric, ()))
    control = _sorted(result.control_values.get(metric, ()))
    words = (
        f"{title(result, others)}, {metric_words(metric)}: {_two(own, unit)} for the "
        f"worst-hit record; {control_words(result)} {_two(control, unit)}."
    )
    with canvas(1.9) as (figure, axes):
        _mirror(axes, own, control, unit)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3
        )
        svg = to_svg(figure, name, words)
    return Picture(
        name, (result.column,), words, svg, _spread_table(own, control, unit)
    )


def title(result: AttackResult, others: Sequence[AttackResult]) -> str:
    """Returns an attack's name, and what tells it from others of that name."""
    variant = difference_words(result, others)
    return f"{result_words(result)}{f' ({variant})' if variant else ''}"


def _sorted(values: Iterable[float]) -> list[float]:
    return sorted(value for value in values if not math.isnan(value))


def _two(values: Sequence[float], unit: str) -> str:
    mean, worst = _quantile_words(values, unit)[:2]
    return f"{mean} on average, {worst}"


def _quantile_words(values: Sequence[float], unit: str) -> list[str]:
    """Returns mean, largest, quartiles from above, and least."""
    if not values:
        return [quantity(math.nan, unit)] * 6
    # None between two values: one of them may be unbounded.
    quartiles = np.quantile(values, (0.75, 0.5, 0.25), method="inverted_cdf")
    found = [sum(values) / len(values), values[-1], *quartiles, values[0]]
    return [quantity(float(each), unit) for each in found]


def _spread_table(own: Sequence[float], control: Sequence[float], unit: str) -> Table:
    names = (
        *("Mean", "Worst-hit record", "Upper quartile", "Median", "Lower quartile"),
        "Least-hit record",
    )
    columns = (_quantile_words(values, unit) for values in (own, control))
    rows = tuple(zip(names, *columns, strict=True))
    count = ("Records", f"{len(own):,}", f"{len(control):,}")
    return Table(("Over records", "Attack", "Control"), (*rows, count))


def _mirror(
    axes: Axes, own: Sequence[float], control: Sequence[float], unit: str
) -> None:
    """Draws records above the line by the attack, below it by its control."""
    scale = 100.0 if unit == "share" else 1.0
    finite = [value for value in (*own, *control) if math.isfinite(value)] or [0.0]
    low, high = (0.0, 1.0) if unit == "share" else (min(finite), max(finite))
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    left, width = scale * edges[:-1], scale * (edges[1] - edges[0])
    looks: dict[int, dict[str, Any]] = {
        1: {"label": "the attack", "facecolor": LOWER, "edgecolor": PAPER},
        -1: {
            "label": "its control",
            "facecolor": "none",
            "edgecolor": UPPER,
            "hatch": "/////",
        },
    }
    for values, side in ((own, 1), (control, -1)):
        if not values:
            continue
        kept = np.clip(values, edges[0], edges[-1])
        counts = side * np.histogram(kept, edges)[0]
        axes.bar(left, counts, width, align="edge", linewidth=0.6, **looks[side])
        mean, end = scale * float(np.mean(kept)), side * abs(counts).max()
        label = "mean" if side > 0 else None
        axes.plot(2 * [mean], [0, end], color=INK, linestyle=":", label=label)
    axes.axhline(0, color=LINE, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0f}"))
    axes.set_ylabel("records")
    axes.grid(axis="y", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel({"share": "%"}.get(unit, unit), loc="right", labelpad=1)


def class_tables(
    results: Sequence[AttackResult],
) -> list[tuple[Column, str, Table]]:
    """Returns each attack's headline by class, with a sentence.

    Only where two classes have five victims or more; others have no row.
    """
    found = []
    for result in results:
        metric = headline(result)
        classes = {
            name: each
            for name, each in result.by_class.items()
            if each.victims >= _FEWEST
        }
        if metric is None or len(classes) < 2:
            continue
        unit = result.units[metric]
        worst, most = max(classes.items(), key=lambda item: item[1].found.value)
        words = (
            f"{title(result, results)}, {metric_words(metric)}: the most of class "
            f"{worst}, {quantity(most.found.value, unit)}."
        )
        rows = tuple(
            (
                name,
                *(
                    f"{quantity(part.value, unit)}\n{interval(part, unit)}"
                    for part in (each.found, each.control)
                ),
                f"{each.victims:,}",
            )
            for name, each in classes.items()
        )
        table = Table(("Class", "Attack", "Control", "Victims"), rows)
        found.append((result.column, words, table))
    return found
