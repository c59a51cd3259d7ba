"""The leakage surface as heat maps: what an attack adds to its control, by cell."""

import math
from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fedpeft.audit.page.drawing import INK, PAPER, UPPER, Picture, Table, canvas, to_svg
from fedpeft.audit.reading import headline, is_above_control, setting_words, varied
from fedpeft.audit.results import AttackResult
from fedpeft.audit.wording import (
    UNKNOWN,
    interval,
    metric_words,
    plain,
    quantity,
    result_words,
)

_MOST_MAPS = 8
"""Of one attack; further cells stand in its table alone."""
_DARKEST = 0.42
"""Opacity of the darkest cell: letters on it stay legible on either paper."""


def surface_pictures(surface: Sequence[AttackResult]) -> list[Picture]:
    """Draws a grid's results: for each attack a heat map of two settings.

    The two with most values span a map; each choice of the others has a map of its own.
    """
    cells = [each for each in surface if each.misfit is None and headline(each)]
    cells.sort(key=_attack)
    pictures = []
    for _, group in groupby(cells, key=_attack):
        pictures += _of_attack(list(group))
    return pictures


def _attack(cell: AttackResult) -> tuple[str, str]:
    return result_words(cell), cell.column


def _of_attack(cells: list[AttackResult]) -> list[Picture]:
    keys = varied(cells)
    across, down, *others = (*keys, "", "")[: max(len(keys), 2)]
    maps: dict[tuple[str, ...], list[AttackResult]] = {}
    for cell in cells:
        maps.setdefault(tuple(_setting(cell, key) for key in others), []).append(cell)
    shown = list(maps.items())[:_MOST_MAPS]
    hidden = len(maps) - len(shown)
    note = f"{hidden} further maps are in report.json alone." if hidden else ""
    return [
        _map(
            group,
            across,
            down,
            ", ".join(
                f"{_title(key)} {value}"
                for key, value in zip(others, fixed, strict=True)
            ),
            f"surface-{cells[0].attack}-{cells[0].threat.access}-{place}",
            note if place == len(shown) - 1 else "",
        )
        for place, (fixed, group) in enumerate(shown)
    ]


def _map(
    cells: list[AttackResult], across: str, down: str, fixed: str, name: str, note: str
) -> Picture:
    metric = headline(cells[0]) or ""
    xs, ys = _values(cells, across), _values(cells, down)
    words = _takeaway(cells, metric, across, down, fixed)
    most = max([_leak(cell, metric) for cell in cells] + [1e-9])
    with canvas(0.75 + 0.42 * len(ys)) as (figure, axes):
        for cell in cells:
            place = (xs.index(_setting(cell, across)), ys.index(_setting(cell, down)))
            _cell(axes, cell, metric, place, most)
        axes.set(xlim=(-0.5, len(xs) - 0.5), ylim=(len(ys) - 0.5, -0.5))
        axes.set_xticks(range(len(xs)), xs)
        axes.set_yticks(range(len(ys)), ys)
        axes.set_xlabel(_title(across), loc="right", labelpad=1)
        axes.set_ylabel(_title(down))
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        svg = to_svg(figure, name, words)
    return Picture(
        name, (cells[0].column,), words, svg, _table(cells, metric, across, down), note
    )


def _cell(
    axes: Axes, cell: AttackResult, metric: str, place: tuple[int, int], most: float
) -> None:
    x, y = place
    strength = _DARKEST * max(_leak(cell, metric), 0.0) / most
    axes.add_patch(
        Rectangle(
            (x - 0.5, y - 0.5), 1, 1, facecolor=UPPER, alpha=strength, edgecolor="none"
        )
    )
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=PAPER, lw=2)
    )
    found = cell.difference.get(metric)
    shown = UNKNOWN if found is None else quantity(found.value, cell.units[metric])
    if found is not None and not is_above_control(cell, metric):
        shown = "at control"
    axes.text(x, y, shown, ha="center", va="center", color=INK, size=8.5)


def _leak(cell: AttackResult, metric: str) -> float:
    found = cell.difference.get(metric)
    return 0.0 if found is None or not math.isfinite(found.value) else found.value


def _takeaway(
    cells: list[AttackResult], metric: str, across: str, down: str, fixed: str
) -> str:
    worst = max(cells, key=lambda cell: _leak(cell, metric))
    quiet = sum(not is_above_control(cell, metric) for cell in cells)
    where = " and ".join(
        setting_words(key, worst.settings.get(key)) for key in (across, down) if key
    )
    begin = f"{result_words(worst)}{f', {fixed}' if fixed else ''}: "
    if quiet == len(cells):
        return f"{begin}at its control in all {len(cells)} cells."
    most = quantity(_leak(worst, metric), worst.units[metric])
    return (
        f"{begin}{metric_words(metric)} up to {most} above control, at {where}; "
        f"{quiet} of {len(cells)} cells are at control."
    )


def _table(cells: list[AttackResult], metric: str, across: str, down: str) -> Table:
    keys = [key for key in (down, across) if key]
    names = [_title(key).capitalize() for key in keys] or ["Cell"]
    rows = []
    for cell in sorted(cells, key=lambda cell: [_order(cell, key) for key in keys]):
        unit = cell.units[metric]
        row = [_setting(cell, key) for key in keys] or ["1"]
        for estimates in (cell.metrics, cell.prior_only, cell.difference):
            found = estimates.get(metric)
            row.append(
                UNKNOWN
                if found is None
                else f"{quantity(found.value, unit)}\n{interval(found, unit)}"
            )
        rows.append((*row, f"{cell.records:,}"))
    header = (*names, "Attack", "Control", "Leak", "n")
    return Table(header, tuple(rows))


def _values(cells: list[AttackResult], key: str) -> list[str]:
    ordered = sorted(cells, key=lambda cell: _order(cell, key))
    return list(dict.fromkeys(_setting(cell, key) for cell in ordered))


def _order(cell: AttackResult, key: str) -> tuple[int, float, str]:
    """Numbers by size, unbounded ones last; then words by letters."""
    value = cell.settings.get(key)
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, str(value)


def _setting(cell: AttackResult, key: str) -> str:
    return plain(cell.settings.get(key)) if key else ""


def _title(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")
