"""The status page as one HTML text: no script, no asset from elsewhere.

The template is ``status.html``. What takes more than a look at the view is worked out
here: words for numbers, and the curve's points and axes.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

REFRESH_SECONDS = 3
ROUNDS_SHOWN = 20
_POINTS = 400
_DOTS = 40
_UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Curve:
    """A curve in a square of 100 by 100, its origin at the top left.

    Attributes:
        points: (x, y) of each round, as text that SVG reads.
        x_ticks: numbers below the square, evenly spaced from left to right.
        y_ticks: numbers beside it, evenly spaced from top to bottom.
        words: what it shows, for those who cannot see it.
    """

    points: list[str]
    x_ticks: list[str]
    y_ticks: list[str]
    words: str

    @property
    def dots(self) -> list[str]:
        """The points that get a dot: all of a few, the last of many."""
        return self.points if len(self.points) <= _DOTS else self.points[-1:]


def render(view: Mapping[str, Any], now: float) -> str:
    """Returns the page of :func:`server.snapshot.view`; all text in it is escaped.

    Args:
        view: what may be shown.
        now: seconds since the epoch.
    """
    over = view["state"] in ("complete", "stopped")
    return _TEMPLATE.render(
        view,
        curve=draw(view["metric"], view["records"], view["rounds"]),
        latest=view["records"][: -ROUNDS_SHOWN - 1 : -1],
        now=now,
        refresh=None if over else REFRESH_SECONDS,
    )


def draw(
    metric: str, records: Sequence[Mapping[str, Any]], rounds: int
) -> Curve | None:
    """Returns the curve of a metric over the rounds; None before the first value.

    >>> records = [{"round": 1, "metric": 0.5}, {"round": 2, "metric": 0.75}]
    >>> curve = draw("accuracy", records, 4)
    >>> curve.points
    ['25,100', '50,16.67']
    >>> curve.x_ticks, curve.y_ticks
    (['0', '1', '2', '3', '4'], ['0.8', '0.7', '0.6', '0.5'])
    """
    values = [
        (record["round"], record["metric"])
        for record in records
        if record["metric"] is not None and math.isfinite(record["metric"])
    ]
    if not values:
        return None
    (first, start), (last, end) = values[0], values[-1]
    x_axis = axis(0, max(rounds, last), smallest=1)
    heights = [height for _, height in values]
    y_axis = axis(min(heights), max(heights), smallest=0.02)
    thinned = values[-1 :: -math.ceil(len(values) / _POINTS)][::-1]
    return Curve(
        points=[
            f"{_share(x, x_axis):g},{round(100 - _share(y, y_axis), 2):g}"
            for x, y in thinned
        ],
        x_ticks=_labels(x_axis),
        y_ticks=_labels(y_axis)[::-1],
        words=f"{metric} by round: {start:.4f} after round {first}, {end:.4f} after "
        f"round {last}, at best {max(heights):.4f}.",
    )


def axis(low: float, high: float, *, smallest: float) -> list[float]:
    """Returns round numbers, evenly spaced, that enclose two; three to six of them.

    >>> axis(0, 20, smallest=1)
    [0, 5, 10, 15, 20]
    >>> axis(0.513, 0.778, smallest=0.02)
    [0.5, 0.6, 0.7, 0.8]
    """
    room = max((high - low) / 4, smallest)
    power = 10.0 ** math.floor(math.log10(room) + 1e-9)
    step = power * next(nice for nice in (1, 2, 5, 10) if nice * power >= room - 1e-9)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(tick * step, 10) for tick in range(start, max(stop, start + 2) + 1)]
    return [int(tick) if tick.is_integer() else tick for tick in ticks]


def epsilon_in_words(value: float | None) -> str:
    """Returns an epsilon to three decimals or digits, rounded up: it is a bound.

    >>> [epsilon_in_words(value) for value in (7.99121, 8.0, 0.00012341, math.inf)]
    ['7.992', '8.000', '0.000124', 'unbounded']
    """
    if value is None or math.isnan(value):
        return _UNKNOWN
    if math.isinf(value):
        return "unbounded"
    exact = Decimal(repr(float(value)))
    places = max(3, 2 - exact.adjusted()) if exact else 3
    return f"{exact.quantize(Decimal(1).scaleb(-places), ROUND_CEILING):f}"


def bytes_in_words(count: int | None) -> str:
    """Returns a number of bytes in units of 1000.

    >>> bytes_in_words(999), bytes_in_words(12_345), bytes_in_words(1_234_567)
    ('999 B', '12 kB', '1.2 MB')
    """
    if count is None:
        return _UNKNOWN
    if count < 1000:
        return f"{count} B"
    size = count / 1000
    for unit in ("kB", "MB", "GB"):
        if size < 999.5:
            return f"{_two_digits(size)} {unit}"
        size /= 1000
    return f"{_two_digits(size)} TB"


def seconds_in_words(seconds: float | None) -> str:
    """Returns a duration in its two largest units.

    >>> [seconds_in_words(time) for time in (0.25, 48, 754, 7380, 187200)]
    ['0.2 s', '48 s', '12 min 34 s', '2 h 3 min', '2 d 4 h']
    """
    if seconds is None:
        return _UNKNOWN
    if seconds < 59.5:
        return f"{_two_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return _two_units((minutes, "min"), (rest, "s"))
    hours, rest = divmod(minutes, 60)
    if hours < 24:
        return _two_units((hours, "h"), (rest, "min"))
    return _two_units((hours // 24, "d"), (hours % 24, "h"))


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _two_units(large: tuple[int, str], small: tuple[int, str]) -> str:
    return " ".join(f"{count} {unit}" for count, unit in (large, small) if count)


def _moment(seconds: float, form: str = "%Y-%m-%d %H:%M:%S UTC") -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(form)


def _percent(part: float | None, whole: float | None) -> float:
    """Returns a share of a bar's length, from 0 to 100."""
    if part is None or not whole or math.isnan(part):
        return 0.0
    return round(100 * min(1.0, max(0.0, part / whole)), 2)


def _share(value: float, ticks: Sequence[float]) -> float:
    return round(100 * (value - ticks[0]) / (ticks[-1] - ticks[0]), 2)


def _labels(ticks: Sequence[float]) -> list[str]:
    """Returns numbers with as many decimals as they need, all the same.

    >>> _labels([0.5, 0.55, 0.6])
    ['0.50', '0.55', '0.60']
    """
    places = max(len(f"{tick:.10g}".partition(".")[2]) for tick in ticks)
    return [f"{tick:.{places}f}" for tick in ticks]


_ENVIRONMENT = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters.update(
    epsilon=epsilon_in_words,
    bytes=bytes_in_words,
    seconds=seconds_in_words,
    moment=_moment,
    percent=_percent,
    known=lambda value: _UNKNOWN if value is None else value,
    metric=lambda value: _UNKNOWN if value is None else f"{value:.4f}",
)
_SOURCE = files("server").joinpath("status.html").read_text(encoding="utf-8")
_TEMPLATE = _ENVIRONMENT.from_string(_SOURCE)
_STYLE = _SOURCE.partition("<style>")[2].partition("</style>")[0]
STYLE_HASH = (
    "'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)
"""The only style that the page's content security policy allows: the template's."""
