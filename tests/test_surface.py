"""A leakage surface: every combination of a grid, run once, and read back."""

import dataclasses
from pathlib import Path

import pytest

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, FedpeftError
from simulations.surface import cells, measure_surface
from tests.test_audit import NAMED

GRID = """
[audit.surface]
"peft.rank" = [2, 4]
privacy = [{unit = "none"}, {unit = "example", target_epsilon = 4.0}]
"""


def test_every_combination_is_a_cell_with_its_keys_changed() -> None:
    grid = cells(RunConfig.from_toml(NAMED + GRID))
    assert [cell.config.peft.options["rank"] for cell in grid] == [2, 2, 4, 4]
    assert [cell.config.privacy.unit for cell in grid] == 2 * ["none", "example"]
    assert {cell.config.privacy.noise for cell in grid} == {"seeded"}  # as it was
    assert grid[1].varied["privacy"] == {"unit": "example", "target_epsilon": 4.0}
    assert len({cell.name for cell in grid}) == 4


def test_another_variant_brings_its_own_keys() -> None:
    text = NAMED + '[audit.surface]\npeft = [{name = "head"}, {name = "bias"}]\n'
    grid = cells(RunConfig.from_toml(text))
    assert [cell.config.peft.name for cell in grid] == ["head", "bias"]
    assert grid[0].config.peft.options == {}


def test_attacks_are_part_of_a_cells_name() -> None:
    config = RunConfig.from_toml(NAMED + GRID)
    other = RunConfig.from_toml(NAMED + GRID, ["audit.attacks=['head_leak']"])
    assert cells(config)[0].name != cells(other)[0].name


def test_cells_of_another_version_are_other_cells(monkeypatch) -> None:
    config = RunConfig.from_toml(NAMED + GRID)
    before = cells(config)[0].name
    monkeypatch.setattr("simulations.surface.__version__", "0.0.0")
    assert cells(config)[0].name != before


def test_a_grid_that_is_none_or_impossible_is_refused() -> None:
    with pytest.raises(ConfigError, match="lists of values"):
        cells(RunConfig.from_toml(NAMED))
    wrong = '[audit.surface]\n"run.rounds" = [0]\n'
    with pytest.raises(ConfigError, match="rounds"):
        cells(RunConfig.from_toml(NAMED + wrong))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ('"run.rounds.x" = [1]', "'rounds' is a key"),
        ('"peft.rnak" = [2]', "peft.rnak = 2: [peft] rnak: lora has no such key"),
        ('"peft.rank" = [2, 0]', "peft.rank = 0: [peft]: expected rank >= 1"),
        ('peft = [{name = "lorra"}]', "did you mean 'lora'?"),
        ('"compression.name" = ["zip"]', "compression.name = zip: "),
        ('"audit.attacks" = [["head_lek"]]', "did you mean 'head_leak'?"),
        ('"peft.rank" = []', "lists of values"),
        ('"run" = [3]', "run = 3: "),
        ('"run.rounds" = [{x = 1}]', "rounds"),
        ('"run.state" = ["here"]', "[audit.surface] run.state: expected a key"),
        ('"run.id" = ["a"]', "run.id: expected a key"),
        ('"audit.record" = [true]', "audit.record: expected a key"),
        ('audit = [{auditor = "a"}]', "audit.auditor: expected a key"),
        ('"audit.surface.run" = [1]', "audit.surface.run: expected a key"),
    ],
)
def test_a_wrong_cell_is_one_line_before_any_is_run(grid: str, message: str) -> None:
    config = RunConfig.from_toml(f"{NAMED}\n[audit.surface]\n{grid}\n")
    with pytest.raises(ConfigError) as error:
        cells(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_cells_are_measured_once(
    minilm: Path, rotten_tomatoes: Path, tmp_path: Path
) -> None:
    grid = '[audit.surface]\n"privacy.unit" = ["none", "example"]\n'
    config = RunConfig.from_toml(NAMED + grid, ["run.rounds=1"])
    said: list[tuple[int, int, str]] = []

    def done(count: int, total: int, words: str) -> None:
        said.append((count, total, words))

    first = measure_surface(config, tmp_path, done=done)
    assert sorted(count for count, *_ in said) == [1, 2]
    assert {result.settings["privacy.unit"] for result in first} == {"none", "example"}
    again = measure_surface(config, tmp_path, done=done)
    assert len(said) == 2  # nothing was run again
    assert [dataclasses.asdict(r) for r in again] == [
        dataclasses.asdict(r) for r in first
    ]
    next(tmp_path.glob("*.json")).write_text("{")
    with pytest.raises(FedpeftError, match="remove it"):
        measure_surface(config, tmp_path, done=done)
