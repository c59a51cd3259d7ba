"""The user's own file: csv, jsonl or parquet, one example a row."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedpeft.data.examples import Completion, Content, Examples
from fedpeft.data.rows import READERS, missing
from fedpeft.errors import DataError
from fedpeft.sections import DataSection

# A float has too few digits to tell long numbers of persons apart.
_NUMBERS: dict[str, tuple[type, ...]] = {
    "text": (),
    "prompt": (),
    "completion": (),
    "label": (int, float),
    "group": (int, float),
    "person": (int,),
}

_WORDS_FOR_NOTHING = frozenset({"na", "n/a", "nan", "none", "null"})


def read(path: Path, section: DataSection) -> Examples:
    """Reads labelled texts, or prompts with their completions.

    Labels and groups may be numbers; they are compared as they are written, so a
    declared ``"1"`` is the number 1 but not 1.0.

    Persons may be whole numbers; spaces around a name do not make it another. A word
    that programs write for a missing value (``NA``, ``null``) is no person: strangers
    who share it would share one person's protection.

    Args:
        path: a file that ends in .csv, .jsonl or .parquet; csv and jsonl in UTF-8.
        section: names the columns and declares the labels.

    Raises:
        DataError: for a file that cannot be read, a missing column, an empty value or
            an undeclared label: one line that names file, place and remedy.
    """
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{path}: expected a file that ends in {', '.join(READERS)}, got "
            f"{path.suffix or 'no ending'!r}; convert or rename the file."
        )
    has_labels = section.completion is None
    wanted = {"text": section.text}
    if section.completion is not None:
        wanted = {"prompt": section.prompt, "completion": section.completion}
    others = {"group": section.group, "person": section.person}
    columns = wanted | {key: name for key, name in others.items() if name is not None}
    label_column = {"label": section.label} if has_labels else {}
    values: dict[str, list[str]] = {key: [] for key in columns}
    labels: list[int | list[int]] = []
    for place, row in READERS[path.suffix.lower()](path, columns | label_column):
        for key, column in columns.items():
            values[key].append(_value(f"{path}, {place}", row, key, column))
        labels.append(_label(f"{path}, {place}", row, section) if has_labels else 0)
    if not labels:
        raise DataError(f"{path}: expected at least one row, got none.")
    contents = zip(*(values[key] for key in wanted), strict=True)
    return Examples(
        contents=tuple(_content(*cells) for cells in contents),
        labels=torch.tensor(labels),
        groups=tuple(values["group"]) if section.group is not None else None,
        label_names=section.labels or ("",),
        persons=tuple(values["person"]) if section.person is not None else None,
    )


def _content(text: str, completion: str | None = None) -> Content:
    return text if completion is None else Completion(text, completion)


def _label(
    place: str, row: Mapping[str, object], section: DataSection
) -> int | list[int]:
    """Returns a label's number; of several labels 0 or 1 for each class."""
    declared = section.labels or ()
    if not section.multi_label:
        return _number(place, _value(place, row, "label", section.label), declared)
    if section.label not in row:
        raise missing(place, "label", section.label, row)
    cell = row[section.label]
    if not isinstance(cell, list):
        cell = str(cell or "").split(section.label_separator)
    stripped = [str(name).strip() for name in cell]
    chosen = {_number(place, name, declared) for name in stripped if name}
    return [int(number in chosen) for number in range(len(declared))]


def _number(place: str, name: str, declared: Sequence[str]) -> int:
    if name not in declared:
        raise DataError(
            f"{place}: expected a label among {', '.join(map(repr, declared))}, got "
            f"{name!r}; correct the row or declare it in [data] labels."
        )
    return declared.index(name)


def _value(place: str, row: Mapping[str, object], key: str, column: str) -> str:
    """Returns a cell as text; numbers may stand for some, see ``_NUMBERS``."""
    if column not in row:
        raise missing(place, key, column, row)
    value = row[column]
    if _is_nothing(value):
        raise DataError(
            f"{place}: expected a {key} in column {column!r}, got none; fill it in or "
            "remove the row."
        )
    if key == "person" and str(value).strip().casefold() in _WORDS_FOR_NOTHING:
        raise DataError(
            f"{place}: expected a person in column {column!r}, got {value!r}, which "
            "means that none is known; fill it in or remove the row."
        )
    if isinstance(value, str) and not _is_encodable(value):
        raise DataError(
            f"{place}: expected a {key} in column {column!r}, got half a character "
            "(a lone surrogate); remove it."
        )
    if isinstance(value, (str, *_NUMBERS[key])) and not (
        key == "person" and isinstance(value, bool)
    ):
        return _plain(str(value)) if key == "person" else str(value)
    raise DataError(
        f"{place}: expected a {key} in column {column!r}, got {value!r}; write it as a "
        "string."
    )


def _is_nothing(value: object) -> bool:
    """Whether a cell is empty; NaN is how parquet and JSON may spell that."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or not str(value).strip()


def _is_encodable(value: str) -> bool:
    """Whether it is Unicode; JSON can spell halves of characters, tokenizers refuse."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(person: str) -> str:
    r"""Returns a name without what no eye sees: one person must not count as two.

    >>> _plain("\ufeffJose\u0301 ") == "Jos\xe9"
    True
    """
    composed = unicodedata.normalize("NFKC", person)
    visible = (letter for letter in composed if unicodedata.category(letter) != "Cf")
    return "".join(visible).strip()
