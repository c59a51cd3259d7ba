"""``fedpeft ledger``: what a client's data have released."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedpeft.cli.common import State
from fedpeft.errors import FedpeftError, RunError

if TYPE_CHECKING:
    from fedpeft.privacy import Ledger

app = typer.Typer(
    help="The privacy ledgers of a state directory.", no_args_is_help=True
)


@app.command("show")
def show(
    state: State,
    delta: Annotated[
        float, typer.Option(min=1e-15, max=0.99, help="The delta at which to account.")
    ] = 1e-5,
) -> None:
    """Show what each data source has released, over all runs."""
    from fedpeft import privacy

    table = Table()
    columns = ("data source", "releases", "runs", "unit, relation", "mechanism")
    for column in (*columns, f"epsilon at {delta:g}"):
        table.add_column(column)
    for source in _sources(state):
        ledger = privacy.verify(state, source)
        entries = ledger.entries
        units = "; ".join(sorted({f"{e.unit}, {e.relation}" for e in entries}))
        runs = len({entry.run for entry in entries})
        spent = f"{_spent(ledger, delta):.4f}"
        if any(entry.mechanism == privacy.SEEDED for entry in entries):
            spent = f"[red]{spent}, noise removable[/red]"
        if len({(e.noise_multiplier, e.sampling_rate) for e in entries}) > 1:
            spent += ", if what changed between runs was fixed beforehand"
        mechanisms = ", ".join(sorted({entry.mechanism for entry in entries}))
        row = (source, str(len(entries)), str(runs), units, mechanisms, spent)
        table.add_row(*row)
    Console().print(table)


@app.command("verify")
def verify(state: State) -> None:
    """Check every ledger's chain, head and outbox."""
    from fedpeft import privacy

    broken = []
    for source in _sources(state):
        try:
            length = len(privacy.verify(state, source).entries)
            print(f"{source}: whole, {length} releases")
        except FedpeftError as error:
            broken.append(source)
            print(f"{source}: {error}")
    if broken:
        raise RunError(f"Not whole: {', '.join(broken)}.")


@app.command("adopt")
def adopt(
    state: State,
    source: Annotated[str, typer.Argument(help="The data source, as `show` names it.")],
    acknowledged: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Entries a server last heard of.")
    ] = 0,
) -> None:
    """Accept a damaged ledger: keep what holds, charge again what is lost."""
    from fedpeft import privacy

    if source not in _sources(state):
        raise RunError(f"No ledger of {source!r} in {state}.")
    adoption = privacy.adopt(state, source, acknowledged=acknowledged)
    print(f"{source}: kept {adoption.kept} releases, charged {adoption.charged} again.")
    if math.isinf(privacy.verify(state, source).spent(1e-5)):
        print("Its epsilon is infinite now: no private release is possible any more.")
    if adoption.backup:
        print(f"The damaged file is kept as {adoption.backup}")


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
