"""``fedpeft search``: which method, rank and placement suits a task."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.cli.common import (
    Overrides,
    Scenario,
    needed_assets,
    pull_missing,
    read_scenario,
)
from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from fedpeft.config import RunConfig
    from fedpeft.search import Trial
    from simulations.search import Search


def search(
    scenario: Scenario,
    overrides: Overrides = None,
    candidates: Annotated[
        Path | None, typer.Option(help="A TOML file of [[candidate]] tables.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="public, or charged: a client's own records.")
    ] = "public",
    client: Annotated[int, typer.Option(help="Which client.")] = 0,
    state: Annotated[
        Path | None, typer.Option(help="Of the client's ledger, for charged data.")
    ] = None,
    budget: Annotated[
        int, typer.Option(min=1, max=100_000, help="Steps a candidate, at first.")
    ] = 4,
    epsilons: Annotated[
        str, typer.Option(help="Train the last ones at these too: 1,4,8.")
    ] = "",
    seed: Annotated[
        int | None, typer.Option(help="Shorthand for --set run.seed=N.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the result there too, as JSON.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, nothing else.")
    ] = False,
) -> None:
    """Compare PEFT methods, ranks and placements on one client's data."""
    from fedpeft.durable import write_atomically

    targets = _epsilons(epsilons)
    config = read_scenario(scenario, overrides, seed)
    state = _state(data, state, config)
    from simulations.comparison import check_scenario
    from simulations.search import search as run

    check_scenario(config, client=client, is_charged=state is not None)
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: expected a file in a folder, got {output}.")
    console = Console(stderr=True, quiet=as_json)
    pull_missing(needed_assets(config), console)
    found = run(
        config,
        candidates=candidates,
        client=client,
        state=state,
        steps=budget,
        epsilons=targets,
        show=lambda trial: console.print(Text(_line(trial)), soft_wrap=True),
    )
    text = json.dumps(found.to_json(), indent=2)
    if output is not None:
        write_atomically(output, text.encode())
    if as_json:
        print(text)
    else:
        _print(found)


def _epsilons(text: str) -> list[float]:
    """Reads numbers with commas between them; none for an empty text."""
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0.0]
    if not all(0 < number < 1e6 for number in found):
        raise ConfigError(
            f"--epsilons: expected numbers above 0 such as 1,4,8, got {text!r}."
        )
    return found


def _state(data: str, state: Path | None, config: "RunConfig") -> Path | None:
    """Returns the state directory of a search that is charged, None of another."""
    if data not in ("public", "charged"):
        raise ConfigError(f"--data: expected public or charged, got {data!r}.")
    if data == "public":
        if state is not None:
            raise ConfigError(
                "--state: expected --data charged beside it, got public data, of which "
                "nothing is charged."
            )
        return None
    if state is None and config.run.state is None:
        raise ConfigError(
            "--data charged: expected --state with the directory of the client's "
            "ledger, got none: every training is charged there."
        )
    return (state or Path(config.run.state or "")).expanduser().absolute()


def _line(trial: "Trial") -> str:
    value = "failed" if trial.value is None else f"{trial.value:.4f}"
    at = "" if trial.epsilon is None else f"  epsilon {trial.epsilon:g}"
    return (
        f"rung {trial.rung}{at}  {trial.steps} steps  {value}  "
        f"{trial.candidate.label}, learning rate {trial.candidate.learning_rate:g}"
    )


def _print(found: "Search") -> None:
    """Prints the rungs, the front and what it cost."""
    console = Console()
    for label, reason in found.skipped.items():
        console.print(f"left out: {label}: {reason}", soft_wrap=True, markup=False)
    console.print(_table("What was trained", found, found.trials))
    front = found.front
    console.print(_table("What nothing else beats", found, front))
    for number, trial in enumerate(front, 1):
        epsilon = "" if trial.epsilon is None else f", epsilon {trial.epsilon:g}"
        title = f"# {number}: {found.comparison.metric} {trial.value:.4f}{epsilon}"
        print(f"{title}\n{trial.candidate.toml}")
    for line in _notes(found):
        print(line)


def _table(title: str, found: "Search", trials: list["Trial"]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    metric = found.comparison.metric
    for name in ("steps", "epsilon", "rate", metric, "bytes up", "values", "s/step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("method", overflow="fold")
    for trial in trials:
        seconds = trial.step_seconds
        table.add_row(
            str(trial.steps),
            "-" if trial.epsilon is None else f"{trial.epsilon:g}",
            f"{trial.candidate.learning_rate:g}",
            "failed" if trial.value is None else f"{trial.value:.4f}",
            f"{trial.bytes_up:,}" if trial.bytes_up else "-",
            f"{trial.trainable_parameters:,}",
            "-" if seconds is None else f"{seconds:.2f}",
            Text(trial.candidate.label),
        )
    return table


def _notes(found: "Search") -> list[str]:
    """Says what was judged on what, and what it cost."""
    comparison, plan = found.comparison, found.plan
    judged = len(comparison.judged)
    notes = [f"Judged on {judged} public examples; the test split was not touched."]
    if comparison.metric == "accuracy":
        notes[0] += f" Their standard error is up to {0.5 / judged**0.5:.3f}."
    if found.spent_before is None:
        trained = len(comparison.examples)
        notes.append(f"Trained on {trained} other public examples: nothing is charged.")
    elif plan is not None:
        notes.append(
            f"Charged to {comparison.source}: epsilon {found.spent_before:.4f} before, "
            f"{found.spent:.4f} now ({plan.unit}, {plan.relation}) at delta "
            f"{plan.target_delta:g}, over all runs of its ledger."
        )
    first = [trial.value for trial in found.trials if trial.rung == 1]
    if len(first) > 2 and 2 * len(set(first)) <= len(first):
        notes.append(
            f"The first rung's {len(first)} trainings gave {len(set(first))} different "
            "values; between equal ones the loss decided: a larger --budget tells more."
        )
    if found.stopped:
        notes.append(f"Stopped before its end: {found.stopped}")
    return notes
