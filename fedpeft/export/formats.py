"""The three formats, and how an export appears: whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from fedpeft.durable import make_directory, sync_directory
from fedpeft.errors import FedpeftError, RunError
from fedpeft.export.adapter import write_peft, write_tensors
from fedpeft.export.card import write_card
from fedpeft.export.merged import write_merged
from fedpeft.export.stored import Trained
from fedpeft.wording import nearest

Write: TypeAlias = Callable[[Trained, Path], None]

FORMATS: dict[str, Write] = {
    "peft": write_peft,
    "merged": write_merged,
    "safetensors": write_tensors,
}
"""How a model may leave, by name."""


def check_export(format: str, output: Path) -> None:
    """Refuses what can be refused before anything is loaded.

    Raises:
        RunError: for an unknown format, or an output that holds something already.
    """
    if format not in FORMATS:
        raise RunError(
            f"--format: expected one of {', '.join(FORMATS)}, got {format!r}"
            f"{nearest(format, FORMATS)}"
        )
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise RunError(
            f"Expected a new output directory, {output} holds something already: "
            "choose another with --output."
        )


def write_export(trained: Trained, format: str, output: Path) -> None:
    """Writes the model and its card into a new directory.

    **Guarantees**: the directory appears whole or not at all, and names no path of this
    machine.

    Args:
        trained: the model; it is used up, since merging changes it in place.
        format: one of :data:`FORMATS`.
        output: the directory; it may exist, but hold nothing.

    Raises:
        RunError: as :func:`check_export`, or if the method cannot leave so; then it
            names the formats that work.
    """
    check_export(format, output)
    parent = output.absolute().parent
    make_directory(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as work:
        folder = Path(work) / "export"
        folder.mkdir()
        write_card(trained, format, folder)  # first: merging renames what it describes
        try:
            FORMATS[format](trained, folder)
        except FedpeftError:
            raise
        except ValueError as error:  # what a method says that has no such format
            raise _impossible(trained, format, error) from None
        _finish(folder)
        folder.rename(output)
    sync_directory(parent)


def _impossible(trained: Trained, format: str, error: ValueError) -> RunError:
    """Returns what to say of a method that has no such format."""
    possible = ["safetensors"]
    others = {"merged": trained.method.merge, "peft": trained.method.to_peft}
    del others[format]
    for name, attempt in others.items():
        try:
            attempt(trained.model.module.backbone)
            possible.insert(0, name)
        except ValueError:
            continue
    reason = str(error).splitlines()[0].partition(": ")[0].rstrip(".")
    return RunError(
        f"--format {format}: {reason}. Formats that work with "
        f"{trained.run.config.peft.name}: {', '.join(possible)}."
    )


def _finish(folder: Path) -> None:
    """Puts the files on disk, readable by whoever may read the card."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors writes files for their owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(folder)
