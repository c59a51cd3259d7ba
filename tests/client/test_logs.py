"""What is logged: whole lines, the fields that were named, and never data."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from client.logs import JsonFormatter, PlainFormatter, configure
from fedpeft.errors import LedgerError


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    known = [
        logger
        for logger in [root, *logging.Logger.manager.loggerDict.values()]
        if isinstance(logger, logging.Logger)
    ]
    before = [(log, log.handlers[:], log.level, log.propagate) for log in known]
    yield
    logging.captureWarnings(False)
    for name in ("client.test", "library"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name in ("client", "fedpeft", "server", "simulations"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    for log, handlers, level, propagate in before:
        log.handlers[:] = handlers
        log.setLevel(level)
        log.propagate = propagate


@pytest.fixture
def stream() -> io.StringIO:
    stream = io.StringIO()
    configure(stream, as_json=True, level="INFO")
    return stream


def _lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def _record(text: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("client.test", 20, "x.py", 1, text, args, None)


def test_a_line_is_json_with_the_fields_that_were_given(stream):
    log = logging.getLogger("client.test")
    log.info("replies=%d", 4, extra={"run": "5f0c", "round": 3, "secret": "x"})
    (line,) = _lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "client.test",
        "message": "replies=4",
        "run": "5f0c",
        "round": 3,
    }


def test_the_time_is_utc_with_milliseconds():
    record = _record("x")
    record.created = 1_000_000_000.1239
    line = json.loads(JsonFormatter().format(record))
    assert line["time"] == "2001-09-09T01:46:40.123Z"
    assert PlainFormatter().format(record) == "01:46:40Z x"


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("two\nlines", None, "two\nlines"),
        ("a\u2028b\x85c %s", "\r\n", "a\u2028b\x85c \r\n"),
        ("number=%d", "none", "number=%d"),
        ("a %", 1, "a %"),
    ],
)
def test_every_record_is_one_line_however_its_message_breaks(text, argument, message):
    record = _record(text, *([] if argument is None else [argument]))
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == message


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (torch.ones(2), "Tensor"),
        (b"gradient", "bytes"),
        (["a review"], "list"),
        (ValueError("a review"), "ValueError"),
        (LedgerError("too short"), "too short"),
        (Path("ledger.jsonl"), "ledger.jsonl"),
    ],
)
def test_an_argument_that_could_hold_data_is_named_by_its_type(stream, data, shown):
    log = logging.getLogger("client.test")
    log.info("got %s", data)
    log.info("got %(it)s", {"it": data})
    assert [line["message"] for line in _lines(stream)] == [f"got {shown}"] * 2


def test_data_are_no_field_either(stream):
    logging.getLogger("client.test").info("x", extra={"client": torch.ones(2)})
    assert _lines(stream)[0]["client"] == "Tensor"


def test_an_error_leaves_its_type_and_trail_but_not_its_text(stream):
    log = logging.getLogger("client.test")
    for error in (ValueError("a review"), LedgerError("too short")):
        try:
            try:
                raise OSError("of a review")
            except OSError as cause:
                raise error from cause
        except ValueError:
            log.exception("failed")
    theirs, ours = _lines(stream)
    assert "review" not in stream.getvalue()
    assert theirs["error"] == "ValueError from OSError"
    assert ours["error"] == "LedgerError: too short from OSError"
    (place,) = theirs["trail"]
    assert place.startswith("client/test_logs.py:")


def test_other_libraries_are_heard_from_warnings_on_and_in_one_line(stream):
    log = logging.getLogger("library")
    log.setLevel(logging.DEBUG)
    log.info("quiet")
    log.warning("a task failed\nfuture: ValueError('a review')")
    warnings.showwarning("old", DeprecationWarning, "x.py", 1)
    heard, warned = _lines(stream)
    assert heard["message"] == "a task failed"
    assert warned["message"] == "x.py:1: DeprecationWarning: old"


def test_our_level_is_the_one_chosen(stream):
    logging.getLogger("server.rounds").debug("hidden")
    configure(stream, as_json=True, level="DEBUG")
    logging.getLogger("server.rounds").debug("shown")
    assert [line["message"] for line in _lines(stream)] == ["shown"]


def test_configuring_again_replaces_what_was(stream):
    other = io.StringIO()
    logging.getLogger("library").addHandler(logging.StreamHandler(stream))
    for _ in range(3):
        configure(other, as_json=False, level="INFO")
    logging.getLogger("library").warning("once")
    assert stream.getvalue() == ""
    assert other.getvalue().endswith("Z WARNING once\n")


def test_a_plain_line_cannot_steer_the_terminal(stream):
    configure(stream, as_json=False, level="INFO")
    logging.getLogger("client.test").info("reason=%s", "a\x1b[2J\nb")
    assert stream.getvalue().endswith("Z reason=a?[2J b\n")


def test_a_plain_line_names_an_error_too(stream):
    configure(stream, as_json=False, level="INFO")
    try:
        raise ValueError("a review")
    except ValueError:
        logging.getLogger("client.test").exception("failed")
    assert "ERROR failed [ValueError; client/test_logs.py:" in stream.getvalue()
    assert "review" not in stream.getvalue()
