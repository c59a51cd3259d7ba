"""The user's own file: csv, jsonl or parquet, one example a row."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from fedpeft.data.examples import TextExamples
from fedpeft.errors import DataError
from fedpeft.wording import nearest

Rows: TypeAlias = Iterator[tuple[str, Mapping[str, object]]]
"""Where a row stands ("line 3"), and its values by column."""


def read(
    path: Path, *, text: str, label: str, labels: Sequence[str], group: str | None
) -> TextExamples:
    """Reads labelled texts.

    Labels and groups may be numbers; they are compared as they are written, so a
    declared ``"1"`` is the number 1 but not 1.0.

    Args:
        path: a file that ends in .csv, .jsonl or .parquet; csv and jsonl in UTF-8.
        text: the column of the texts.
        label: the column of the labels.
        labels: the labels that may occur, in the order of their numbers.
        group: the column of the groups, or None.

    Raises:
        DataError: for a file that cannot be read, a missing column, an empty value or
            an undeclared label: one line that names file, place and remedy.
    """
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path}: expected a file that ends in {', '.join(_READERS)}, got "
            f"{path.suffix or 'no ending'!r}; convert or rename the file."
        )
    columns = {"text": text, "label": label}
    if group is not None:
        columns["group"] = group
    numbers = {name: number for number, name in enumerate(labels)}
    values: dict[str, list[str]] = {key: [] for key in columns}
    for place, row in _READERS[path.suffix.lower()](path, columns):
        for key, column in columns.items():
            values[key].append(_value(f"{path}, {place}", row, key, column))
        if values["label"][-1] not in numbers:
            raise DataError(
                f"{path}, {place}: expected a label among "
                f"{', '.join(map(repr, numbers))}, got {values['label'][-1]!r}; "
                "correct the row or declare it in [data] labels."
            )
    if not values["text"]:
        raise DataError(f"{path}: expected at least one row, got none.")
    return TextExamples(
        texts=tuple(values["text"]),
        labels=torch.tensor([numbers[name] for name in values["label"]]),
        groups=tuple(values["group"]) if group is not None else None,
        label_names=tuple(labels),
    )


def _value(place: str, row: Mapping[str, object], key: str, column: str) -> str:
    """Returns a cell as text; only a number may stand for one, and not for a text."""
    if column not in row:
        raise _missing(place, key, column, row)
    value = row[column]
    if value is None or not str(value).strip():
        raise DataError(
            f"{place}: expected a {key} in column {column!r}, got none; fill it in or "
            "remove the row."
        )
    if isinstance(value, str) and not _is_encodable(value):
        raise DataError(
            f"{place}: expected a {key} in column {column!r}, got half a character "
            "(a lone surrogate); remove it."
        )
    is_number = isinstance(value, int | float)
    if isinstance(value, str) or (is_number and key != "text"):
        return str(value)
    raise DataError(
        f"{place}: expected a {key} in column {column!r}, got {value!r}; write it as a "
        "string."
    )


def _is_encodable(value: str) -> bool:
    """Whether it is Unicode; JSON can spell halves of characters, tokenizers refuse."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_header(
    path: Path, columns: Mapping[str, str], header: Collection[str]
) -> None:
    for key, column in columns.items():
        if column not in header:
            raise _missing(str(path), key, column, header)


def _missing(place: str, key: str, column: str, known: Iterable[str]) -> DataError:
    return DataError(
        f"{place}: expected a column {column!r}, got none{nearest(column, known)} Name "
        f"the column by [data] {key}."
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check [data] path."
        ) from None


def _read_text(path: Path) -> str:
    data = _read_bytes(path).removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: expected UTF-8, got the byte "
            f"0x{data[error.start]:02x}; save the file as UTF-8."
        ) from None


def _csv_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    # strict: a quote that is never closed must not swallow the rows that follow.
    lines = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = next((cells for cells in lines if cells), [])
        if header:
            _check_header(path, columns, header)
        for cells in lines:
            if len(cells) == len(header):
                yield f"line {lines.line_num}", dict(zip(header, cells, strict=True))
            elif cells:  # an empty line is no row
                raise DataError(
                    f"{path}, line {lines.line_num}: expected {len(header)} values, as "
                    f"in the header, got {len(cells)}; put quotes around commas."
                )
    except csv.Error as error:
        raise DataError(
            f"{path}, line {lines.line_num}: expected csv, got a broken value "
            f"({error}); check the quotes from there upwards."
        ) from None


def _jsonl_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    del columns  # each line has its own; they are checked value by value
    # Not splitlines(): it also cuts at characters that may stand inside a JSON string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: expected a JSON object, got a line that is "
                f"none ({error}); write one object a line."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: expected a JSON object, got a "
                f"{type(row).__name__}; write one object a line."
            )
        yield f"line {number}", row


def _parquet_rows(path: Path, columns: Mapping[str, str]) -> Rows:
    try:
        import pyarrow as pa  # an extra: only who has parquet files needs it
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(
            f"{path}: reading parquet takes pyarrow, which is not installed; run "
            '`pip install "fedpeft[hub]"`, or use csv or jsonl.'
        ) from None
    source = pa.BufferReader(_read_bytes(path))
    try:
        _check_header(path, columns, pq.read_schema(source).names)
        names = list(dict.fromkeys(columns.values()))
        table = pq.read_table(source, columns=names).to_pydict()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: expected a parquet file, got something else ({reason}); "
            "write the file anew."
        ) from None
    for number, cells in enumerate(
        zip(*(table[name] for name in names), strict=True), start=1
    ):
        yield f"row {number}", dict(zip(names, cells, strict=True))


_READERS: dict[str, Callable[[Path, Mapping[str, str]], Rows]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}
