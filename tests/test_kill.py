"""A run killed with -9 at any point resumes to what it would have been."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.privacy import data_sources, read_memory, verify
from fedpeft.tensors import flatten
from tests.helpers import SMALL

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-c", "from fedpeft.cli import main; main()"]


def _simulate(scenario: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    arguments = ["simulate", str(scenario), "--output", str(output), "--json", *options]
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def _kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _entries(output: Path) -> list[dict]:
    """All ledger lines that are whole, of all clients."""
    entries = []
    for path in sorted((output / "ledger").glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            entries.append(json.loads(line))
    return entries


def _released(output: Path) -> dict[tuple, str]:
    """What each client released in each round; fails if one was released twice."""
    released = {}
    for entry in _entries(output):
        key = (entry["data_source"], entry["run"], entry["round"])
        assert key not in released
        released[key] = entry["payload_hash"]
    return released


def _model(output: Path) -> torch.Tensor:
    return flatten(load_file(output / "model" / "adapter.safetensors"))


def _events(output: Path) -> int:
    path = output / "events.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before-any-answer": lambda run: (run / "config.toml").exists(),
    "first-answer": lambda run: len(_entries(run)) >= 1,
    "after-round-1": lambda run: _events(run) >= 1,
    "in-round-2": lambda run: len(_entries(run)) >= 3,
    "outbox-of-round-3": lambda run: (
        len(list((run / "outbox").rglob("*-000000003.safetensors"))) >= 1
    ),
    "checkpoint-3": lambda run: (
        run / "checkpoint" / "round-000003.safetensors"
    ).exists(),
}


@pytest.fixture(scope="module")
def scenario(small_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "small.toml"
    path.write_text(SMALL.format(path=small_reviews))
    return path


@pytest.fixture(scope="module")
def whole(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    output = tmp_path_factory.mktemp("run") / "whole"
    return _finish(_simulate(scenario, output)), _model(output)


@pytest.mark.parametrize("moment", MOMENTS)
def test_seeded_noise_gives_identical_tensors_and_epsilon(
    moment: str, scenario: Path, whole: tuple, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    _kill_when(_simulate(scenario, output), lambda: MOMENTS[moment](output))
    result = _finish(_simulate(scenario, output, "--resume"))
    assert torch.equal(_model(output), whole[1])
    assert result["privacy"] == whole[0]["privacy"]
    assert result["final"] == whole[0]["final"]
    assert len(_released(output)) == 6


PERSONAL = ("--set", 'peft.share=["lora_A", "head"]')


@pytest.fixture(scope="module")
def personal(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "personal"
    _finish(_simulate(scenario, output, *PERSONAL))
    return output


def _local_parts(output: Path) -> list[torch.Tensor]:
    run = RunConfig.from_file(output / "config.toml").run.id
    sources = data_sources(output)
    return [flatten(read_memory(output, s, run).local) for s in sources]


@pytest.mark.parametrize("moment", ["in-round-2", "outbox-of-round-3"])
def test_what_stays_at_a_client_is_neither_lost_nor_trained_twice(
    moment: str, scenario: Path, personal: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    killed = _simulate(scenario, output, *PERSONAL)
    _kill_when(killed, lambda: MOMENTS[moment](output))
    result = _finish(_simulate(scenario, output, *PERSONAL, "--resume"))
    assert torch.equal(_model(output), _model(personal))
    for mine, whole in zip(_local_parts(output), _local_parts(personal), strict=True):
        assert torch.equal(mine, whole)
    whole = json.loads((personal / "result.json").read_text())
    assert result["final"] == whole["final"]
    assert len(_released(output)) == 6


def test_secure_noise_replays_what_was_final(scenario: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    secure = ("--set", "privacy.noise=secure", "--set", "run.workers=2")
    run = _simulate(scenario, output, *secure)
    _kill_when(run, lambda: len(_entries(output)) >= 3)
    before = _released(output)
    result = _finish(_simulate(scenario, output, *secure, "--resume"))
    after = _released(output)
    assert before.items() <= after.items()
    assert len(after) == 6
    spent = [verify(output, source).spent(1e-5) for source in data_sources(output)]
    assert result["privacy"]["spent_epsilon"] == max(spent)


def test_a_lost_state_directory_is_noticed_on_resume(
    scenario: Path, tmp_path: Path
) -> None:
    output, state = tmp_path / "run", tmp_path / "state"
    place = ("--set", f"run.state={state}")
    _kill_when(_simulate(scenario, output, *place), lambda: _events(output) >= 2)
    state.rename(tmp_path / "elsewhere")
    process = _simulate(scenario, output, *place, "--resume")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "ledger-refused" in err.splitlines()[-1]
