"""``fedpeft audit`` at its edges: what it refuses, how it ends, what it leaves."""

import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fedpeft import cli
from fedpeft.audit.results import Audit
from fedpeft.keys import create_auditor, create_signing
from tests.audit.examples import ALL


@pytest.fixture(autouse=True)
def _no_lasting_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets variables for good; here they end with the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture
def fedpeft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpeft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output, errors = capsys.readouterr()
        return int(ended.value.code or 0), output, errors

    return run


@pytest.fixture
def error(fedpeft: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs what must fail; returns its one line."""

    def run(*arguments: object) -> str:
        code, output, errors = fedpeft(*arguments)
        assert (code, output) == (4, ""), errors
        (line,) = errors.splitlines()
        assert line.startswith("Error: ")
        return line

    return run


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the next audits find what one of the examples says."""

    def choose(name: str) -> None:
        def found(*_: Any) -> Audit:
            return ALL[name]()

        monkeypatch.setattr("fedpeft.cli.audit.collect", found)

    return choose


def test_help_tells_the_exit_codes(fedpeft) -> None:
    code, output, _ = fedpeft("audit", "run", "--help")
    assert code == 0
    assert "0 pass, 1 leakage over policy, 2 claim refuted" in " ".join(output.split())
    assert "audit " in fedpeft("--help")[1]


def test_a_bare_audit_shows_its_help_and_is_an_error(fedpeft) -> None:
    code, output, errors = fedpeft("audit")
    assert (code, errors) == (4, "")
    assert "verify" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "found no config.toml in nowhere"),
        (["run", "nowhere"], "found no config.toml in nowhere"),
        (["--scenario", "audit_text"], "expected --output"),
        (["--scenario", "no_such", "--output", "x"], "got 'no_such'"),
        (["some", "--scenario", "audit_text"], "got both"),
        (["--output", "x"], "got none"),
        (
            ["--scenario", "audit_text", "--output", "x", "--ledgers", "y"],
            "--ledgers, --auditor-key: expected a run",
        ),
        (["nowhere", "--policy", "none.toml"], "Cannot read the policy none.toml"),
        (["nowhere", "--key", "none.key"], "Cannot read none.key"),
        (["nowhere", "--auditor-key", "none.key"], "Cannot read none.key"),
        (["nowhere", "--junit", "no/such/folder.xml"], "--junit: expected a file"),
        (["nowhere", "--polcy", "x"], "--polcy"),
        (["nowhere", "another"], "another"),
        (["verify", "report.json"], "--public"),
        (["verify", "report.json", "--public", "none.pub"], "Cannot read none.pub"),
    ],
)
def test_every_error_ends_with_4_and_is_one_line(error, arguments, message) -> None:
    assert message in error("audit", *arguments)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('audit.attacks=["span_txt"]', "span_txt"),
        ("audit.roundz=3", "did you mean 'rounds'?"),
        ("privacy.unit=hospital", "unit"),
        ('audit.surface={"peft.rnak"=[2]}', "rnak: lora has no such key"),
        ('audit.surface={"run.rounds.x"=[2]}', "'rounds' is a key"),
    ],
)
def test_a_wrong_scenario_is_known_before_anything_runs(
    error, tmp_path, override, message
) -> None:
    output = tmp_path / "audit"
    options = ("--scenario", "audit_text", "--output", output, "--set", override)
    assert message in error("audit", *options)
    assert not output.exists()


def test_a_run_that_has_not_ended_is_refused(error, tmp_path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert "Expected a finished run" in error("audit", tmp_path)


def test_keys_of_the_wrong_kind_are_refused(error, tmp_path) -> None:
    signing = create_signing(tmp_path, "one").with_suffix(".key")
    auditor, _ = create_auditor(tmp_path, "two")
    assert "Expected an Ed25519 key" in error("audit", "x", "--key", auditor)
    assert "an auditor's key" in error("audit", "x", "--auditor-key", signing)
    signing.chmod(0o644)
    assert "chmod 600" in error("audit", "x", "--key", signing)


@pytest.mark.parametrize(
    ("name", "code", "summary"),
    [
        ("usual", 0, "Pass."),
        ("open", 1, "Fail: more leakage than the policy allows."),
        ("falsified", 2, "Fail: the claimed guarantee is refuted."),
        ("inconclusive", 3, "Inconclusive: not every line could be settled."),
    ],
)
def test_an_audit_ends_with_its_verdict(
    fedpeft, finds, tmp_path, name, code, summary
) -> None:
    finds(name)
    output, junit = tmp_path / "audit", tmp_path / "junit.xml"
    options = ("--scenario", "audit_text", "--output", output, "--junit", junit)
    ended, said, _ = fedpeft("audit", *options)
    *gates, last, place = said.splitlines()
    assert (ended, last) == (code, summary)
    assert place == f"Report: {output / 'report.html'} (unsigned: --key signs it)"
    assert len(gates) == 6
    assert re.match(r"\S+ +\[this run, replay\] The claimed guarantee", gates[0])
    report = json.loads((output / "report.json").read_text())
    assert report["outcome"]["exit_code"] == code
    assert junit.read_text().count("<testcase") == 6


def test_a_policy_of_ones_own_decides(fedpeft, finds, tmp_path) -> None:
    finds("open")
    policy = tmp_path / "mine.toml"
    policy.write_text(
        '[[line]]\ncolumn = "replay"\nmetric = "span_text.token_top1"\n'
        "leak_at_most = 1.0"
    )
    options = ("--scenario", "audit_text", "--output", tmp_path / "x")
    assert fedpeft("audit", *options, "--policy", policy)[0] == 0
    policy.write_text(policy.read_text().replace("span_text.token_top1", "*.rouge_1"))
    assert fedpeft("audit", *options, "--policy", policy)[0] == 3


def test_a_signed_report_verifies_until_a_byte_is_flipped(
    fedpeft, error, finds, tmp_path
) -> None:
    finds("usual")
    public = create_signing(tmp_path, "me")
    output = tmp_path / "audit"
    options = ("--scenario", "audit_text", "--output", output)
    code, said, _ = fedpeft("audit", *options, "--key", public.with_suffix(".key"))
    assert code == 0
    assert "unsigned" not in said
    check = ("audit", "verify", output / "report.json", "--public", public)
    code, said, _ = fedpeft(*check)
    assert (code, len(said.splitlines())) == (0, 1)
    page = output / "report.html"
    data = bytearray(page.read_bytes())
    data[len(data) // 2] ^= 1
    page.write_bytes(data)
    assert "Not verified: report.html in" in error(*check)


def test_what_nobody_foresaw_is_no_verdict(error, monkeypatch, tmp_path) -> None:
    def fails(*_: Any) -> Audit:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("fedpeft.cli.audit.collect", fails)
    options = ("--scenario", "audit_text", "--output", tmp_path / "x")
    assert "Unexpected ZeroDivisionError" in error("audit", *options)


def test_other_commands_keep_their_exit_code(fedpeft) -> None:
    code, _, errors = fedpeft("simulate", "no_such")
    assert code == 2
    assert errors.startswith("Error: ")
