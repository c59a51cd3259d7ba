"""``fedpeft status``: how a server's run stands, asked over its status page."""

import json
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Annotated, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.errors import RunError

_DEFAULT = "http://127.0.0.1:8080"
_TIMEOUT_SECONDS = 10.0
_MAX_BYTES = 1 << 26


def status(
    url: Annotated[str, typer.Argument(help="Where the server's page is.")] = _DEFAULT,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print status.json and nothing else.")
    ] = False,
) -> None:
    """Say how a server's run stands: rounds, metric, privacy, clients."""
    found = _ask(url)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    try:
        table = _table(found)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _not_ours(url) from None
    Console().print(table)


def _ask(url: str) -> dict[str, Any]:
    """Fetches ``status.json``, straight from the host named: no proxy is asked."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise RunError(f"Expected an address such as {_DEFAULT}, got {url}.")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        address = f"{url.rstrip('/')}/status.json"
        with opener.open(address, timeout=_TIMEOUT_SECONDS) as answer:
            found = json.loads(answer.read(_MAX_BYTES))
    except (HTTPError, HTTPException, ValueError):
        raise _not_ours(url) from None
    except OSError as error:
        cause = getattr(error, "reason", error)
        reason = getattr(cause, "strerror", None) or cause
        raise RunError(
            f"Nothing answers at {url} ({reason}); "
            "start `fedpeft server`, or give the address that its log names."
        ) from None
    if not isinstance(found, dict) or found.get("format") != "fedpeft-status/1":
        raise _not_ours(url)
    return found


def _not_ours(url: str) -> RunError:
    return RunError(
        f"What answers at {url} is no fedpeft server of this version: give the address "
        "of its status page, as its log names it."
    )


def _table(found: dict[str, Any]) -> Table:
    """Returns the short table; text of the server's is shown, never obeyed."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in [*_progress(found), *_privacy(found), *_clients(found)]:
        style = "red" if name == "noise" else ""
        table.add_row(Text(_printable(name)), Text(_printable(value), style))
    return table


def _progress(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from server.page import seconds_in_words

    yield "run", found["run"]
    yield "state", found["state"]
    yield "round", f"{found['server_round']} of {found['rounds']}"
    if found["value"] is not None:
        yield found["metric"], f"{float(found['value']):.4f}"
    if found["seconds_left"] is not None:
        yield "time left, about", seconds_in_words(float(found["seconds_left"]))


def _privacy(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from server.page import epsilon_in_words

    privacy = found["privacy"]
    if privacy is None:
        yield "privacy", "none"
        return
    spent = epsilon_in_words(float(privacy["spent_epsilon"]))
    yield "unit of privacy", f"one {privacy['unit']}, {privacy['relation']}"
    yield "epsilon spent", f"{spent} of {privacy['target_epsilon']:g}"
    yield "epsilon planned", epsilon_in_words(float(privacy["planned_epsilon"]))
    yield "delta", f"{privacy['target_delta']:g}"
    if privacy["noise"] == "seeded":
        yield "noise", "seeded: whoever knows the seed can remove it"


def _clients(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from server.page import bytes_in_words

    yield "clients connected", f"{len(found['connected'])} of {found['expected']}"
    if found["hides_clients"]:
        yield "answers", "how many is the server's secret"
    else:
        yield "bytes up", bytes_in_words(found["bytes_up"])
        yield "bytes down", bytes_in_words(found["bytes_down"])
    for code, count in found["codes"].items():
        yield f"code {code}", str(count)


def _printable(text: str) -> str:
    """Keeps what a server says from steering the terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
