"""What either side writes while it runs: one JSON object a line, or plain lines.

    {"time": "2026-01-31T12:00:00.000Z", "level": "INFO", "logger": "server.rounds",
     "message": "round=3 replies=4/4", "run": "5f0c", "round": 3}

**Guarantees.** A log may be read by people who may not read the data. So nothing goes
into a line but a message, four named fields, and of an error its type and the lines of
code that it passed: an error's own text may quote a record, and is left out unless the
error is one of ours. An argument of a message that could hold data (an array, bytes, a
container, an error) is replaced by the name of its type, and of another library's
message only the first line is kept. What this cannot see is data that somebody has
already put into the text of a message.
"""

import json
import logging
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TextIO

from fedpeft.errors import FedpeftError

FIELDS = ("run", "round", "client", "code")
"""What a record may carry by ``extra={...}``; anything else in it is not written."""

OURS = ("client", "fedpeft", "server", "simulations")
"""Loggers that are heard from the chosen level on; all others from WARNING on."""

_HARMLESS = (bool, int, float, str, PurePath, type(None), FedpeftError)


def configure(stream: TextIO, *, as_json: bool, level: int | str = "INFO") -> None:
    """Sends every log line of this process to `stream`, and nowhere else.

    Handlers of other libraries are taken off, since they would write past the
    formatter. Calling it again changes stream, form and level; do so after the imports
    that bring such handlers.

    Args:
        stream: where lines go; each is flushed at once.
        as_json: JSON lines, for machines; plain ones, for a terminal, otherwise.
        level: of our own loggers.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    handler.addFilter(_is_wanted)
    for logger in _loggers():
        logger.handlers.clear()
        logger.propagate = True
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII, so that no message breaks the line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; `error` and `trail` are there where an error is logged."""
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        extra = vars(record)
        line |= {name: _safe(extra[name]) for name in FIELDS if name in extra}
        if error := _error(record):
            line["error"] = _named(error)
            line["trail"] = _trail(error)
        return json.dumps(line, default=str)


class PlainFormatter(logging.Formatter):
    """One plain line a record, without characters that steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line: time of day in UTC, level unless it is INFO, message."""
        words = [f"{_time(record)[11:19]}Z"]
        if record.levelno != logging.INFO:
            words.append(record.levelname)
        words.append(_message(record))
        if error := _error(record):
            words.append(f"[{_named(error)}; {' > '.join(_trail(error))}]")
        line = " ".join(" ".join(words).split())
        return "".join(sign if sign.isprintable() else "?" for sign in line)


def _time(record: logging.LogRecord) -> str:
    when = datetime.fromtimestamp(record.created, UTC)
    return f"{when.isoformat(timespec='milliseconds').removesuffix('+00:00')}Z"


def _message(record: logging.LogRecord) -> str:
    """Returns the message; a broken one as it stands in the code.

    Were the error to leave, `logging` would print the arguments as they are.
    """
    args = record.args
    try:
        if isinstance(args, Mapping):
            text = str(record.msg) % {key: _safe(value) for key, value in args.items()}
        elif args:
            text = str(record.msg) % tuple(_safe(value) for value in args)
        else:
            text = str(_safe(record.msg))
    except Exception:
        text = str(record.msg)
    return text if _is_ours(record) else text.partition("\n")[0]


def _safe(value: object) -> object:
    return value if isinstance(value, _HARMLESS) else _type(value)


def _type(value: object) -> str:
    return type(value).__name__


def _error(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _named(error: BaseException) -> str:
    """Returns an error's type and what caused it; the words of our own errors alone."""
    name = f"{_type(error)}: {error}" if isinstance(error, FedpeftError) else ""
    cause = error.__cause__
    return (name or _type(error)) + (f" from {_named(cause)}" if cause else "")


def _trail(error: BaseException) -> list[str]:
    """Returns ``folder/file.py:line`` of every frame, the outermost first."""
    return [
        f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in OURS


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or _is_ours(record)


def _loggers() -> list[logging.Logger]:
    """Returns every logger but the root."""
    known = logging.Logger.manager.loggerDict.values()
    return [logger for logger in known if isinstance(logger, logging.Logger)]
