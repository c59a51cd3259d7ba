"""The user's own files: what is read, and the one line for all that is wrong."""

import builtins
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft.data import Examples, load
from fedpeft.errors import ConfigError, DataError
from fedpeft.sections import DataSection

ROWS: list[dict[str, object]] = [
    {"review": "good, really", "stars": 2, "site": "north", "guest": 7},
    {"review": 'she said "no"\nand left', "stars": 1, "site": "south", "guest": 8},
    {"review": "é\u2028", "stars": 2, "site": "north", "guest": 7},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """Writes rows in the format of the suffix."""
    if path.suffix == ".csv":
        lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
        quoted = [
            ",".join('"' + cell.replace('"', '""') + '"' for cell in line)
            for line in lines
        ]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines_of_json = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n\n".join(lines_of_json), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path: Path, **keys: object) -> Examples:
    described = {"text": "review", "label": "stars", "labels": ("1", "2")}
    return load(
        DataSection.model_validate(
            {"path": str(path), "nominal_examples": 1, **described, **keys}
        )
    )


def complaint(path: Path, **keys: object) -> str:
    """Reads in vain and returns the message: one line that starts with the file."""
    with pytest.raises(DataError) as caught:
        read(path, **keys)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".CSV"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train{suffix.lower()}", ROWS)
    path = path.rename(tmp_path / f"train{suffix}")
    examples = read(path, group="site", person="guest")
    assert examples.contents == tuple(row["review"] for row in ROWS)
    assert examples.labels.tolist() == [1, 0, 1]
    assert examples.groups == ("north", "south", "north")
    assert examples.label_names == ("1", "2")
    assert examples.persons == ("7", "8", "7")
    assert read(path).groups is None
    assert read(path).persons is None


def test_byte_order_mark_and_empty_lines_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xef\xbb\xbf\r\nreview,stars\r\n\r\nfine,1\r\n\r\n")
    assert read(path).contents == ("fine",)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_missing_column_lists_the_columns_and_the_nearest(
    tmp_path: Path, suffix: str
) -> None:
    path = write(tmp_path / f"train{suffix}", ROWS)
    message = complaint(path, text="revue")
    assert "expected a column 'revue', got none; did you mean 'review'?" in message
    assert "did you mean 'review'? Name the column by [data] text." in message
    assert "[data] group" in complaint(path, group="hospital")
    assert "[data] person" in complaint(path, person="patient")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_column_that_stands_twice_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    if suffix == ".csv":
        path.write_text("review,stars,stars\nfine,1,2\n")
    else:
        columns = [pa.array(["fine"]), pa.array([1]), pa.array([2])]
        names = ["review", "stars", "stars"]
        pq.write_table(pa.Table.from_arrays(columns, names), path)
    message = ": expected one column 'stars', got 2; rename the others."
    assert complaint(path) == message


@pytest.mark.parametrize(
    ("suffix", "place"),
    [(".csv", "line 5"), (".jsonl", "line 5"), (".parquet", "row 3")],
)
def test_undeclared_label_says_which_and_where(
    tmp_path: Path, suffix: str, place: str
) -> None:
    path = write(tmp_path / f"train{suffix}", [*ROWS[:2], {**ROWS[2], "stars": 3}])
    assert complaint(path) == (
        f", {place}: expected a label among '1', '2', got '3'; correct the row or "
        "declare it in [data] labels."
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("key", ["review", "stars", "site", "guest"])
def test_empty_value_is_refused(tmp_path: Path, suffix: str, key: str) -> None:
    rows = [{name: str(value) for name, value in row.items()} for row in ROWS]
    rows[2][key] = " "
    path = write(tmp_path / f"train{suffix}", list[dict[str, object]](rows))
    message = complaint(path, group="site", person="guest")
    place = {".csv": "line 5", ".jsonl": "line 5", ".parquet": "row 3"}[suffix]
    assert message.startswith(f", {place}: ")
    assert f"in column {key!r}, got none; fill it in or remove the row." in message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("key", ["review", "stars", "site", "guest"])
def test_null_is_refused(tmp_path: Path, suffix: str, key: str) -> None:
    path = write(tmp_path / f"train{suffix}", [ROWS[0], {**ROWS[1], key: None}])
    message = complaint(path, group="site", person="guest")
    assert f"in column {key!r}, got none" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("key", ["stars", "site", "guest"])
def test_not_a_number_is_no_value(tmp_path: Path, suffix: str, key: str) -> None:
    path = write(tmp_path / f"train{suffix}", [{**ROWS[0], key: float("nan")}])
    message = complaint(path, group="site", person="guest")
    assert f"in column {key!r}, got none" in message


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("word", ["NA", " null ", "None", "NaN", "n/a"])
def test_word_for_nothing_is_no_person(tmp_path: Path, suffix: str, word: str) -> None:
    path = write(tmp_path / f"train{suffix}", [{**ROWS[0], "guest": word}])
    message = complaint(path, person="guest")
    assert f"expected a person in column 'guest', got {word!r}, which" in message
    assert read(path).contents == ("good, really",)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_spaces_do_not_make_another_person(tmp_path: Path, suffix: str) -> None:
    rows = [{**ROWS[0], "guest": name} for name in ("ada", " ada", "ada\t", "Ada")]
    path = write(tmp_path / f"train{suffix}", rows)
    assert read(path, person="guest").persons == ("ada", "ada", "ada", "Ada")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_persons_that_a_float_may_have_rounded_are_refused(
    tmp_path: Path, suffix: str
) -> None:
    path = write(tmp_path / f"train{suffix}", [{**ROWS[0], "guest": 1e16}])
    message = complaint(path, person="guest")
    assert (
        "expected a person in column 'guest', got 1e+16; write it as a str" in message
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_file_without_rows_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"review": [], "stars": []}), path)
    else:
        path.write_text("")
    assert complaint(path) == ": expected at least one row, got none."


def test_header_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("review,stars\n")
    assert "expected at least one row" in complaint(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_unreadable_file_says_why(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    assert complaint(path) == (
        ": cannot be read (No such file or directory); check [data] path."
    )
    path.mkdir()
    assert "cannot be read (Is a directory)" in complaint(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_other_encodings_are_refused_with_the_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_bytes("review,stars\nfine,1\ncafé,2\n".encode("latin-1"))
    assert complaint(path) == (
        ", line 3: expected UTF-8, got the byte 0xe9; save the file as UTF-8."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "review,stars\na,b,1\n",
            ", line 2: expected 2 values, as in the header, got 3",
        ),
        ("review,stars\nab\n", ", line 2: expected 2 values, as in the header, got 1"),
        ('review,stars\n"never closed,1\nfine,2\n', "expected csv, got a broken value"),
    ],
)
def test_broken_csv_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(content)
    assert message in complaint(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "expected a JSON object, got a line that is none"),
        ("[1, 2]", "expected a JSON object, got a list"),
        ("[" * 100_000, "expected a JSON object, got a line that is none"),
        ('{"review": 5, "stars": 1}', "expected a text in column 'review', got 5"),
        (
            '{"review": "a", "stars": [1]}',
            "expected a label in column 'stars', got [1]",
        ),
        ('{"review": "a\\ud800", "stars": 1}', "got half a character"),
        ('{"stars": 1}', "expected a column 'review', got none (known: stars)."),
    ],
)
def test_broken_jsonl_is_refused_with_the_line(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"review": "fine", "stars": 1}}\n{line}\n')
    found = complaint(path)
    assert found.startswith(", line 2: ")
    assert message in found


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", ROWS)
    data = path.read_bytes()
    path.write_bytes(b"no parquet at all")
    assert "expected a parquet file" in complaint(path)
    path.write_bytes(data[: len(data) // 2] + data[-8:])
    assert "expected a parquet file" in complaint(path)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "train.parquet", ROWS)
    real_import = builtins.__import__

    def without_pyarrow(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert '`pip install "fedpeft[hub]"`' in complaint(path)


@pytest.mark.parametrize("name", ["train.txt", "train"])
def test_unknown_ending_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "train.csv", ROWS).rename(tmp_path / name)
    assert "ends in .csv, .jsonl, .parquet, got" in complaint(path)


def test_label_declared_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", ROWS)
    with pytest.raises(ConfigError, match="expected each label once, got 1, 2, 1"):
        read(path, labels=("1", "2", "1"))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"unreadable": "skip"}, "unreadable"),
        ({"prompt": "review"}, "prompt"),
        ({"labels": None, "completion": "stars"}, "text"),
        ({"labels": None, "completion": "stars", "text": "text"}, "label"),
    ],
)
def test_keys_of_another_kind_of_source_are_refused(
    tmp_path: Path, keys: dict[str, object], key: str
) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ConfigError, match=rf"\[data\] {key}: describes .*, got a file"):
        read(path, **keys)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_missing_column_of_prompts_names_its_key(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train{suffix}", ROWS)
    section = DataSection(path=str(path), prompt="revue", completion="site")
    with pytest.raises(
        DataError, match=r"'review'\? Name the column by \[data\] prompt"
    ):
        load(section)


def test_persons_are_kept_whole_until_there_are_enough(tmp_path: Path) -> None:
    rows = [{"review": str(i), "stars": 1, "guest": i // 4} for i in range(20)]
    path = write(tmp_path / "train.csv", rows)
    examples = read(path, person="guest", max_examples=6)
    assert examples.persons is not None
    assert len(examples) == 8
    assert {examples.persons.count(guest) for guest in examples.persons} == {4}


@pytest.mark.parametrize("key", ["image_size", "max_length"])
def test_sizes_that_would_fill_the_memory_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        DataSection.model_validate({"name": "mnist", key: 10**6})
