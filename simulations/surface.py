"""The leakage surface: the same attacks on every combination of a grid.

One cell is a run of its own with a few keys changed, attacked like any other. Cells run
side by side, one process a core; what a folder holds already is not run again.
"""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from fedpeft import __version__
from fedpeft.audit.results import AttackResult
from fedpeft.config import RunConfig
from fedpeft.durable import write_atomically
from fedpeft.errors import ConfigError, FedpeftError
from fedpeft.menus import check_variants
from simulations.attacking import attacks_of, run_attacks
from simulations.observing import observe, set_stage

Done = Callable[[int, int, str], None]
"""Is told how many cells are done, of how many, and which was the last."""

_RESULTS = TypeAdapter(list[AttackResult])
_FIXED = ("run.id", "run.state", "audit.auditor", "audit.record", "audit.surface")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        config: with it.
        varied: key -> value, as the grid has them.
    """

    config: RunConfig
    varied: dict[str, Any]

    @property
    def name(self) -> str:
        """Its file's; equal for equal configurations of one version."""
        measured = f"{__version__}\n{self.config.to_toml()}"
        return hashlib.sha256(measured.encode()).hexdigest()[:16]


def cells(config: RunConfig) -> list[Cell]:
    """Returns every combination of ``[audit.surface]``.

    A value that is a table replaces keys of the section that it is given for.

    **Guarantees**: every variant and attack that a combination names can be built.

    Raises:
        ConfigError: if there is no grid, or a combination is no possible run.
    """
    grid = config.audit.surface
    if not grid or not all(grid.values()):
        raise ConfigError(
            "[audit.surface]: expected keys with lists of values, such as "
            '"peft.rank" = [4, 8], got none.'
        )
    combinations = itertools.product(*grid.values())
    return [
        _cell(config, dict(zip(grid, values, strict=True))) for values in combinations
    ]


def _cell(config: RunConfig, varied: dict[str, Any]) -> Cell:
    table = config.model_dump(mode="json", exclude_none=True)
    table["audit"].pop("surface")
    for path, value in varied.items():
        _check_path(path, value)
        _put(table, path, value)
    try:
        cell = Cell(RunConfig.from_table(table), varied)
        check_variants(cell.config)
        attacks_of(cell.config)
    except ConfigError as error:
        raise ConfigError(f"[audit.surface] {_words(varied)}: {error}") from None
    return cell


def _check_path(path: str, value: Any) -> None:
    """Refuses a key that makes no other run, or that a cell has no use for."""
    keys = [f"{path}.{key}" for key in value] if isinstance(value, Mapping) else [path]
    for key in keys:
        if any(f"{key}.".startswith(f"{fixed}.") for fixed in _FIXED):
            raise ConfigError(
                f"[audit.surface] {key}: expected a key that shapes a run, got one of "
                f"{', '.join(_FIXED)}: leave it out."
            )


def _put(table: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"[audit.surface] {path}: expected a section before the last dot, but "
                f"{section!r} is a key."
            )
    # A variant brings its own hyperparameters: those of another would be refused.
    fresh = isinstance(value, Mapping) and "name" not in value
    old = table.get(key, {})
    table[key] = {**old, **value} if fresh and isinstance(old, dict) else value


def measure_surface(
    config: RunConfig, folder: Path, *, done: Done, workers: int | None = None
) -> list[AttackResult]:
    """Runs all cells that `folder` does not hold yet, and returns all results.

    Args:
        config: with a grid.
        folder: one file a cell; a run that is interrupted goes on from there.
        done: is told of every cell.
        workers: processes of one thread each; None takes one a core.

    Raises:
        ConfigError: names the cell that is no possible run.
    """
    grid = cells(config)
    missing = [cell for cell in grid if not (folder / f"{cell.name}.json").exists()]
    finished = len(grid) - len(missing)
    spawn = multiprocessing.get_context("spawn")
    size = min(workers or os.cpu_count() or 1, max(1, len(missing)))
    with ProcessPoolExecutor(size, mp_context=spawn) as pool:
        futures = {
            pool.submit(_measure, cell.config.to_toml(), str(folder / cell.name)): cell
            for cell in missing
        }
        for future in as_completed(futures):
            future.result()
            finished += 1
            done(finished, len(grid), _words(futures[future].varied))
    return [result for cell in grid for result in _results(folder, cell)]


def _measure(toml: str, path: str) -> None:
    """Runs one cell in a process of its own."""
    torch.set_num_threads(1)
    config = RunConfig.from_toml(toml)
    run = config.run.model_copy(update={"workers": 0})
    config = config.model_copy(update={"run": run})
    with tempfile.TemporaryDirectory() as folder:
        cases = observe(config, Path(folder) / "run", config.audit.rounds)
    results = run_attacks(set_stage(config), cases, "replay", lambda text: None)
    in_short = [result.in_short() for result in results]
    text = json.dumps(_RESULTS.dump_python(in_short, mode="json"))
    write_atomically(Path(f"{path}.json"), text.encode())


def _results(folder: Path, cell: Cell) -> list[AttackResult]:
    path = folder / f"{cell.name}.json"
    try:
        found = _RESULTS.validate_python(json.loads(path.read_text()))
    except ValueError:
        raise FedpeftError(
            f"Expected a cell of the surface in {path}, got something else: remove it, "
            "and it is measured again."
        ) from None
    return [
        dataclasses.replace(result, settings={**result.settings, **cell.varied})
        for result in found
    ]


def _words(varied: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} = {value}" for path, value in varied.items())
