"""``fedpeft server``: serve a run to clients over gRPC."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from fedpeft.cli.common import needed_assets, pull_missing, read_scenario
from fedpeft.config import RunConfig
from fedpeft.errors import RunStopped
from fedpeft.report import RoundReporter, result_table

Settings = Annotated[Path, typer.Argument(help="The server's settings file.")]


def server(settings: Settings) -> None:
    """Serve one run to clients over gRPC; started again, it goes on."""
    from client.settings import read_settings
    from server.settings import ServerSettings

    section = read_settings(settings, ServerSettings).server
    config = _scenario(section.scenario, settings.absolute().parent)
    console = Console(stderr=True)
    pull_missing(needed_assets(config), console)
    from client.logs import configure
    from server.deploy import deploy

    stop = stop_on_signals()
    configure(sys.stderr, as_json=not sys.stderr.isatty())
    try:
        if sys.stderr.isatty():
            with RoundReporter(config.run.rounds, console):
                result = deploy(section, config, stop, console.print)
        else:
            result = deploy(section, config, stop, _log)
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        return
    Console().print(result_table(result))
    print(f"Run directory: {section.output}")


def stop_on_signals() -> threading.Event:
    """Returns what SIGTERM and SIGINT set; a second one ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


def _log(line: str) -> None:
    import logging

    logging.getLogger("server").info(line)


def _scenario(scenario: str, folder: Path) -> RunConfig:
    """Reads a scenario by shipped name, or by a path that counts from `folder`."""
    beside = folder / Path(scenario).expanduser()
    return read_scenario(str(beside) if beside.is_file() else scenario, None, None)
