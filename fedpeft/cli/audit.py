"""``fedpeft audit``: attack one's own federation, and say what follows.

It ends with 0 for a pass, 1 for leakage over the policy, 2 for a refuted claim, 3 for
what could not be settled, and 4 for any error, also of usage.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from fedpeft.cli.common import (
    Overrides,
    needed_assets,
    pull_missing,
    read_scenario,
)
from fedpeft.errors import ConfigError, RunError
from fedpeft.wording import printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from fedpeft.audit.gates import Verdict
    from fedpeft.audit.policy import Policy
    from fedpeft.audit.results import AttackResult, Audit
    from fedpeft.config import RunConfig

_LONGEST = 400
_SUMMARIES = {
    "pass": "Pass.",
    "leakage": "Fail: more leakage than the policy allows.",
    "falsified": "Fail: the claimed guarantee is refuted.",
    "inconclusive": "Inconclusive: not every line could be settled.",
}


class _Audit(TyperGroup):
    """A group whose first command needs no name: ``fedpeft audit RUN``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Audit,
    help="Attack a run or a scenario, and write its privacy report: audit RUN.",
    no_args_is_help=True,
)


@app.command("run")
def run(
    run: Annotated[
        Path | None, typer.Argument(help="The directory of a finished run.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="Audit this scenario instead of a run.")
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the report goes; default: RUN/audit.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="What must be shown; default: a shipped one.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write the policy's lines as JUnit XML too.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="NAME.signing.key, which signs the report.")
    ] = None,
    auditor_key: Annotated[
        Path | None, typer.Option(help="NAME.auditor.key, which opens what RUN kept.")
    ] = None,
    ledgers: Annotated[
        Path | None,
        typer.Option(
            help="Ledgers that clients handed over: of each its ledger/ and heads/ "
            "file, under a name of its own."
        ),
    ] = None,
) -> None:
    """Audit a run: `fedpeft audit RUN` is enough.

    Exit codes: 0 pass, 1 leakage over policy, 2 claim refuted, 3 inconclusive, 4 error.
    """
    folder = _report_folder(run, scenario, output)
    if run is None and (ledgers or auditor_key):
        raise RunError("--ledgers, --auditor-key: expected a run, got --scenario.")
    demands = _policy(policy)
    secret = _signing_key(key)
    opener = _auditor_key(auditor_key)
    _check_junit(junit)
    config = _config(run, scenario, overrides or ())
    started = time.monotonic()
    audit = collect(run, config, folder, overrides or (), opener, ledgers)
    from fedpeft.audit.gates import judge_policy
    from fedpeft.audit.junit import to_junit
    from fedpeft.audit.report import write_report

    verdict = judge_policy(demands, audit)
    write_report(audit, verdict, folder, secret)
    if junit is not None:
        junit.write_bytes(to_junit(verdict, time.monotonic() - started))
    _say(verdict)
    unsigned = "" if secret else " (unsigned: --key signs it)"
    print(f"Report: {folder / 'report.html'}{unsigned}")
    raise typer.Exit(verdict.exit_code)


@app.command("verify")
def verify(
    file: Annotated[
        Path, typer.Argument(help="report.html, report.json, or their directory.")
    ],
    public: Annotated[
        Path, typer.Option(help="NAME.signing.pub of who is said to have signed.")
    ],
) -> None:
    """Check that a report is byte for byte what was signed."""
    from fedpeft.audit.signing import FILES, verify_report
    from fedpeft.keys.files import read_file

    folder = verify_report(file, read_file(public))
    print(f"Verified: {' and '.join(FILES)} in {folder} are as {public} signed them.")


def collect(
    run: Path | None,
    config: "RunConfig",
    folder: Path,
    overrides: Sequence[str],
    key: "X25519PrivateKey | None",
    ledgers: Path | None,
) -> "Audit":
    """Audits the run or the scenario, and the surface if one is asked for."""
    from simulations.audit import audit_run, audit_scenario
    from simulations.replaying import public

    console = Console(stderr=True)
    pull_missing(needed_assets(public(config)), console)
    # Clients are asked what they must refuse: that they do is no news.
    logging.getLogger("client").setLevel(logging.ERROR)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if run is None:
        audit = audit_scenario(config, folder, say=say)
    else:
        audit = audit_run(run, key=key, ledgers=ledgers, overrides=overrides, say=say)
    if not config.audit.surface:
        return audit
    surface = tuple(_surface(public(config), folder / "surface", console))
    return dataclasses.replace(audit, surface=surface)


def _surface(
    config: "RunConfig", folder: Path, console: Console
) -> "list[AttackResult]":
    """Measures all cells, with a bar on a terminal and a line a cell elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from simulations.surface import measure_surface

    columns = (TextColumn("surface {task.completed}/{task.total}"), BarColumn())
    disable = not console.is_terminal
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=disable
    ) as bar:
        task = bar.add_task("surface", total=None)

        def done(count: int, total: int, words: str) -> None:
            bar.update(task, completed=count, total=total)
            line = f"cell {count} of {total}: {words}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        return measure_surface(config, folder, done=done)


def _report_folder(run: Path | None, scenario: str | None, output: Path | None) -> Path:
    """Returns where the report goes, if what is audited was named well."""
    if (run is None) == (scenario is None):
        got = "none" if run is None else "both"
        raise RunError(f"Expected either a run or --scenario, got {got}.")
    if run is not None:
        return output or run / "audit"
    if output is None:
        raise RunError("--scenario: expected --output with a directory.")
    return output


def _config(
    run: Path | None, scenario: str | None, overrides: Sequence[str]
) -> "RunConfig":
    """Reads the configuration; what it asks of an audit is tried before anything runs.

    That is that each attack is known, and each cell of a surface a possible run.
    """
    if run is None:
        config = read_scenario(scenario or "", [*overrides], None)
    else:
        from fedpeft.audit.evidence import read_run
        from simulations.replaying import with_settings

        config = with_settings(read_run(run)[0], overrides)
    from fedpeft.attacks import ATTACKS
    from fedpeft.config import build

    for section in config.audit.attacks or ():
        build(ATTACKS, section, "audit.attacks")
    if config.audit.surface:
        from simulations.replaying import public
        from simulations.surface import cells

        cells(public(config))
    return config


def _policy(path: Path | None) -> "Policy":
    from fedpeft.audit.policy import default_policy, read_policy

    return default_policy() if path is None else read_policy(path)


def _signing_key(path: Path | None) -> bytes | None:
    """Reads the key before the work starts, and tries it."""
    if path is None:
        return None
    from fedpeft.keys import sign
    from fedpeft.keys.files import read_secret

    secret = read_secret(path)
    sign(b"", secret)
    return secret


def _auditor_key(path: Path | None) -> "X25519PrivateKey | None":
    from fedpeft.keys.sealing import read_auditor

    return None if path is None else read_auditor(path)


def _check_junit(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(
            f"--junit: expected a file in a directory that exists, got {path}."
        )


def _say(verdict: "Verdict") -> None:
    for gate in verdict.gates:
        column = gate.column.replace("-", " ").replace("both", "this run, replay")
        found = printable(f"[{column}] {gate.rule}. {gate.detail}", _LONGEST)
        print(f"{gate.status:13} {found}")
    print(_SUMMARIES[verdict.outcome])
