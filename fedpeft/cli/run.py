"""``fedpeft simulate``, ``budget`` and ``doctor``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedpeft.cli.common import (
    Overrides,
    Scenario,
    needed_assets,
    pull_missing,
    read_scenario,
)
from fedpeft.errors import RunError
from fedpeft.report import RoundReporter, result_table

Seed = Annotated[int | None, typer.Option(help="Shorthand for --set run.seed=N.")]


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
    config = read_scenario(scenario, overrides, seed)
    if output is None:
        output = _new_directory(Path("runs"), Path(scenario).stem)
    console = Console(stderr=True, quiet=as_json)
    pull_missing(needed_assets(config), console)
    from simulations.engine import simulate as run

    with RoundReporter(config.run.rounds, console):
        result = run(config, output, resume=resume)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(result_table(result))
        print(f"Run directory: {output}")


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
    config = read_scenario(scenario, overrides, None)
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


def _new_directory(parent: Path, name: str) -> Path:
    """Returns a path that does not exist yet."""
    number = 1
    while (path := parent / f"{name}-{number:03d}").exists():
        number += 1
    return path
