"""``fedpeft client``: answer a server's requests with this site's own records."""

import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fedpeft.cli.common import assets_of, pull_missing
from fedpeft.cli.server import stop_on_signals
from fedpeft.errors import ConfigError, RunError

if TYPE_CHECKING:
    from fedpeft.doctor import Finding

_ALARMS = ("NOTHING", "RAISES", "SEEDED")

Settings = Annotated[Path, typer.Argument(help="The client's settings file.")]


def client(
    settings: Settings,
    accept: Annotated[
        str | None, typer.Option(help="Accept the plan with this hash, once for all.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try everything; spend and keep nothing.")
    ] = False,
) -> None:
    """Train for a server on this site's own records, until its run is finished."""
    from client.settings import ClientSettings, read_settings

    own = read_settings(settings, ClientSettings)
    if accept is not None and not re.fullmatch("[0-9a-f]{64}", accept):
        raise ConfigError(
            f"--accept: expected the 64 hex digits that were shown, got {accept!r}."
        )
    from client.check import examine
    from client.daemon import serve
    from client.logs import configure

    configure(sys.stderr, as_json=not sys.stderr.isatty())
    if check:
        _print(examine(own, _fetch))
        return
    serve(own, accept=accept, show=_show, fetch=_fetch, stop=stop_on_signals())


def _fetch(names: list[str]) -> None:
    pull_missing(assets_of(*names), Console(stderr=True))


def _show(terms: list[tuple[str, str]], plan: str) -> None:
    """Shows a plan: as a table on a terminal, else in the log."""
    if not sys.stderr.isatty():
        for name, value in terms:
            logging.getLogger("client").info("plan %s: %s: %s", plan, name, value)
        return
    last = Column(overflow="fold")  # whole, however long a word is
    table = Table("", last, title="The server proposes", show_header=False)
    for name, value in terms:
        style = "bold red" if any(word in value for word in _ALARMS) else ""
        table.add_row(Text(name), Text(value, style))  # Text: no markup of the server's
    Console(stderr=True).print(table)


def _print(findings: list["Finding"]) -> None:
    """Prints a table of what was looked at.

    Raises:
        RunError: names what is not in order.
    """
    table = Table("", "", Column(overflow="fold"), show_header=False, box=None)
    for finding in findings:
        word = "ok" if finding.ok else "FAIL"
        table.add_row(word, finding.what, Text(finding.detail))
    Console().print(table)
    broken = [finding.what for finding in findings if not finding.ok]
    if broken:
        raise RunError(f"Not in order: {', '.join(broken)}.")
