"""What several commands share: options, scenarios, the assets that they need."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedpeft.config import RunConfig

Scenario = Annotated[
    str, typer.Argument(help="A scenario file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: section.key=value.")
]
State = Annotated[Path, typer.Argument(help="A run directory or a [run] state.")]


def read_scenario(
    scenario: str, overrides: list[str] | None, seed: int | None
) -> RunConfig:
    """Reads a scenario by path or name; checks that its variants exist."""
    from fedpeft.scenarios import find_scenario

    changes = list(overrides or [])
    if seed is not None:
        changes.append(f"run.seed={seed}")
    config = RunConfig.from_file(find_scenario(scenario), changes)
    from fedpeft.menus import check_variants  # slow, and a wrong key is known by now

    check_variants(config)
    return config


def needed_assets(config: RunConfig) -> list[str]:
    """Returns the assets that a configuration needs."""
    return assets_of(config.model.backbone, config.data.name or "")


def assets_of(*names: str) -> list[str]:
    """Returns the assets that backbones and data sets are made of; unknown: none."""
    from fedpeft import assets

    return [asset for name in names for asset in assets.needed_by(name)]


def pull_missing(names: list[str], console: Console) -> None:
    """Fetches assets that are not at hand, with a bar on a terminal."""
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
