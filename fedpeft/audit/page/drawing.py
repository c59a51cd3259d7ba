"""Pictures as inline SVG: drawn by matplotlib, coloured by the page's style sheet.

Colours are written as CSS variables, so that one picture serves light, dark and paper;
letters stay letters, in the page's own font. Each picture has a sentence that says what
it shows, and a table with the same figures.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedpeft.audit.results import Column

WIDTH = 4.7
"""Of a picture, in inches: what a telephone shows without making letters too small."""

INK, QUIET, LINE = "#010101", "#020202", "#030303"
UPPER, LOWER, PAPER = "#040404", "#050505", "#060606"
_VARIABLES = {
    INK: "ink",
    QUIET: "quiet",
    LINE: "line",
    UPPER: "blue",
    LOWER: "orange",
    PAPER: "paper",
}
"""Placeholders that matplotlib takes for colours -> the style sheet's variables."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedpeft",
    # A label may hold what others have named: a dollar sign is one.
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.color": LINE,
    "ytick.labelcolor": QUIET,
    "grid.color": LINE,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Table:
    """The same figures as a picture, to be read; the first cell of a row names it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """What a page shows.

    Attributes:
        name: an id on the page.
        columns: of evidence that it rests on; each has a label beside the picture.
        takeaway: one sentence.
        svg: the drawing.
        table: its figures.
        note: what else to know; empty for nothing.
    """

    name: str
    columns: tuple[Column, ...]
    takeaway: str
    svg: str
    table: Table
    note: str = ""


@contextmanager
def canvas(height: float) -> Iterator[tuple[Figure, Axes]]:
    """Gives a figure of :data:`WIDTH` and its axes, in the page's style.

    Args:
        height: in inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def to_svg(figure: Figure, name: str, words: str) -> str:
    """Returns a figure as SVG for inside a page.

    **Guarantees**: the same figure gives the same text; it asks for nothing from
    elsewhere; ids begin with `name`, so that several pictures fit on one page; words
    and labels come out as they are, whatever signs they hold.

    Args:
        figure: drawn within :func:`canvas`.
        name: of the picture.
        words: for those who cannot see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', lambda _: f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-')
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    label = escape(words)

    def head(found: re.Match[str]) -> str:
        return f'<svg viewBox="{found[1]}" role="img" aria-label="{label}">'

    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, svg, count=1).strip()
