"""How a forecast looks: small tables on a terminal, small pictures in a file."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.columns import Columns
from rich.console import RenderableType
from rich.table import Table

from fedpeft.errors import RunError
from fedpeft.planner import Curve, Forecast
from fedpeft.privacy.plan import Plan

SUFFIXES = (".png", ".svg", ".pdf")

# Blue, vermilion and grey of Okabe & Ito, which the colour-blind can tell apart.
_LINE, _PLAN, _TARGET = "#0072B2", "#D55E00", "#595959"
_GRID = "#E0E0E0"


def check_path(path: Path) -> None:
    """Refuses a file that cannot be drawn.

    Raises:
        RunError: if the name does not end in one of :data:`SUFFIXES`, or there is no
            such directory.
    """
    if not path.parent.is_dir():
        raise RunError(
            f"--plot: expected a file in a directory that exists, got {path}; make the "
            "directory first."
        )
    if path.suffix not in SUFFIXES:
        raise RunError(
            f"--plot: expected a file name that ends in {', '.join(SUFFIXES)}, got "
            f"{path.name!r}."
        )


def tables(forecast: Forecast) -> list[RenderableType]:
    """Returns the plan, the curves and the allowances, to be printed in this order."""
    plan = forecast.plan
    shown: list[RenderableType] = [_plan_table(forecast)]
    curves = [_curve_table(curve, plan) for curve in forecast.curves]
    shown.append(Columns(curves, padding=(1, 1)))
    if forecast.allowances:
        shown.append(_allowance_table(forecast))
    shown.append("* the plan; of a curve, all else is as planned")
    return shown


def draw(forecast: Forecast, path: Path) -> None:
    """Draws epsilon against each quantity, one small picture each, in one file.

    All share the axis of epsilon; both axes are logarithmic. The target is a dashed
    line, the plan a larger point.

    Args:
        forecast: what to draw.
        path: the file; its suffix is the format.

    Raises:
        OSError: if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    plan, curves = forecast.plan, forecast.curves
    figure = Figure(figsize=(3.2 * len(curves), 3.4), layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    figure.suptitle(
        f"Privacy of one {plan.unit} ({plan.relation}) at delta {plan.target_delta:g}"
    )
    plain = StrMethodFormatter("{x:g}")
    for curve, part in zip(curves, axes, strict=True):
        values = [row.value for row in curve.rows]
        costs = [row.epsilon for row in curve.rows]
        planned = [row.is_plan for row in curve.rows].index(True)
        part.axhline(plan.target_epsilon, color=_TARGET, linestyle="--", label="target")
        part.plot(values, costs, color=_LINE, marker="o", markersize=4)
        point = (values[planned], costs[planned])
        part.plot(*point, "D", color=_PLAN, label="plan", zorder=3)
        part.set(xscale="log", yscale="log", xlabel=curve.quantity)
        part.set_xticks(_legible(values, values[planned]))
        part.xaxis.set_minor_locator(NullLocator())
        part.xaxis.set_major_formatter(plain)
        part.grid(color=_GRID)
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].yaxis.set_major_formatter(plain)
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("epsilon")
    axes[-1].legend()
    figure.savefig(path, dpi=150)


def _legible(values: Sequence[float], planned: float) -> list[float]:
    """Returns the values whose labels do not run into each other on a log axis.

    The planned one first, then both ends.

    >>> _legible([1, 2, 3, 4, 5, 6, 7, 8, 16, 32], planned=8)
    [8, 1, 32, 2, 4, 16]
    """
    apart = 0.17 * math.log(values[-1] / values[0])
    kept: list[float] = []
    for value in (planned, values[0], values[-1], *values):
        if all(abs(math.log(value / other)) > apart for other in kept):
            kept.append(value)
    return kept


def _plan_table(forecast: Forecast) -> Table:
    plan = forecast.plan
    table = Table(title="Privacy plan", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("unit of privacy", plan.unit)
    table.add_row("neighbouring relation", plan.relation)
    table.add_row("rounds in all", str(forecast.rounds))
    table.add_row("rounds that a client is charged for", str(plan.max_participations))
    table.add_row("noised steps a round", str(plan.local_steps))
    table.add_row("sampling", f"{plan.sampling}, rate {plan.sampling_rate:.4g}")
    table.add_row("clipping norm", f"{plan.clipping_norm:g}")
    table.add_row("noise multiplier", f"{plan.noise_multiplier:g}")
    if plan.bands is not None:
        table.add_row("noise correlated over", f"{plan.bands} rounds")
    if plan.count_noise is not None:
        table.add_row("noise on the count within the norm", f"{plan.count_noise:g}")
    if plan.max_examples is not None:
        table.add_row("examples of a person in a step", f"{plan.max_examples} at most")
    table.add_row("delta", f"{plan.target_delta:g}")
    table.add_row("target epsilon", f"{plan.target_epsilon:g}")
    table.add_row(_epsilon(plan, "epsilon planned"), f"{plan.planned_epsilon:.4f}")
    return table


def _curve_table(curve: Curve, plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for header in (curve.quantity.replace(" ", "\n"), "steps", _epsilon(plan)):
        table.add_column(header, justify="right")
    for row in curve.rows:
        value = f"{'* ' if row.is_plan else ''}{row.value:g}"
        table.add_row(value, str(row.steps), f"{row.epsilon:.4f}")
    return table


def _allowance_table(forecast: Forecast) -> Table:
    plan = forecast.plan
    title = f"What the target epsilon of {plan.target_epsilon:g} allows"
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD)
    columns = ("noise\nmultiplier", "rounds", "rounds that a client\nis charged for")
    for header in (*columns, _epsilon(plan)):
        table.add_column(header, justify="right")
    for allowed in forecast.allowances:
        table.add_row(
            f"{'* ' if allowed.is_plan else ''}{allowed.noise_multiplier:g}",
            str(allowed.rounds),
            str(allowed.participations),
            f"{allowed.epsilon:.4f}",
        )
    return table


def _epsilon(plan: Plan, name: str = "epsilon") -> str:
    """Never without what it is about."""
    return f"{name} ({plan.unit},\n{plan.relation})"
