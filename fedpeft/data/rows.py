"""The formats of a user's file: csv, jsonl and parquet, row by row."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from fedpeft.errors import DataError
from fedpeft.wording import nearest

Rows: TypeAlias = Iterator[tuple[str, Mapping[str, object]]]
"""Where a row stands ("line 3"), and its values by column."""


def missing(place: str, key: str, column: str, known: Iterable[str]) -> DataError:
    """Returns the error of a file, or a row, that lacks a column.

    Args:
        place: the file, and the row where there is one.
        key: of ``[data]``, by which the column was named.
        column: what was looked for.
        known: the columns that are there.
    """
    return DataError(
        f"{place}: expected a column {column!r}, got none{nearest(column, known)} Name "
        f"the column by [data] {key}."
    )


def _check_header(
    path: Path, columns: Mapping[str, str], header: Sequence[str]
) -> None:
    for key, column in columns.items():
        if column not in header:
            raise missing(str(path), key, column, header)
        if header.count(column) > 1:
            raise DataError(
                f"{path}: expected one column {column!r}, got {header.count(column)}; "
                "rename the others."
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


READERS: dict[str, Callable[[Path, Mapping[str, str]], Rows]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}
"""The reader of each ending; it takes the columns that are wanted, by key."""
