"""``fedpeft export``: take a finished run's model away."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedpeft.cli.common import assets_of, pull_missing


def export(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    format: Annotated[
        str,
        typer.Option(
            help="peft (an adapter), merged (a whole model) or safetensors (tensors)."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Directory; default: RUN/export/FORMAT.")
    ] = None,
    port: Annotated[
        str | None,
        typer.Option(help="Put it on this other backbone of the same shapes."),
    ] = None,
) -> None:
    """Write the model and its card so that they load without fedpeft."""
    from fedpeft.export import check_export, read_run, rebuild, write_export

    target = output or run / "export" / format
    check_export(format, target)
    stored = read_run(run)
    backbone = port or stored.config.model.backbone
    pull_missing(assets_of(backbone), Console(stderr=True))
    write_export(rebuild(stored, port), format, target)
    print(f"Wrote {target}: its README.md says what it is and how to use it.")
