"""How errors are worded: one line, what was expected, what came, the nearest name."""

import difflib
from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns the end of a sentence: a near miss's right name, or all that is known.

    >>> nearest("lable", ["text", "label"])
    "; did you mean 'label'?"
    >>> nearest("film", ["text", "label"])
    ' (known: label, text).'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f" (known: {', '.join(known)})." if known else "."


def printable(text: str, longest: int) -> str:
    r"""Returns text of another party as one line that no terminal obeys.

    Args:
        text: whatever came.
        longest: letters of it that are kept; how many are left out is said.

    >>> printable("a\x1b[2J\nb", 100) == "a\N{REPLACEMENT CHARACTER}[2J b"
    True
    >>> printable("abcde", 3)
    'abc ... (2 letters more)'
    """
    line = " ".join(text.split())
    if len(line) > longest:
        line = f"{line[:longest]} ... ({len(line) - longest} letters more)"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def one_line(error: ValidationError, model: Any, section: str = "") -> str:
    """Turns pydantic's first complaint about a configuration into one line.

    Args:
        error: as raised.
        model: what was validated: a pydantic model, or a variant's dataclass.
        section: the section that a variant belongs to; empty for a whole file.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if section:
        path = [section, *path]
    *sections, key = path or [""]
    # A complaint about a section as a whole names no key of it.
    whole = first["type"] == "value_error" and (section or len(path) == 1)
    where = f"[{'.'.join(path)}]" if whole else f"[{'.'.join(sections)}] {key}"
    where = where.removeprefix("[] ")
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(key, _known_keys(model, sections))}"
    if first["type"] == "missing":
        return f"{where}: expected a value, got none; add it to the file."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[:1].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{where}: {message}." if where else f"{message}."
    message = message.replace("input should be", "expected", 1)
    return f"{where}: {message}, got {first['input']!r}."


def _known_keys(model: Any, sections: list[str]) -> list[str]:
    for section in sections:
        kind = model.model_fields[section].annotation
        model = next((k for k in get_args(kind) if k is not NoneType), kind)
    return list(model.model_fields)
