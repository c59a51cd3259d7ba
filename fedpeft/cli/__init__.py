"""The command line: the only room that knows all of the others.

One file a group of commands. Heavy modules are imported inside the commands, so that
``--help`` and a wrong key answer at once.
"""

import os
import sys

import click
import typer
import typer.core

from fedpeft.cli import (
    assets,
    audit,
    client,
    export,
    keys,
    ledger,
    run,
    search,
    server,
    status,
)
from fedpeft.errors import FedpeftError
from fedpeft.wording import printable

_LONGEST = 1000
"""Letters of an error: it may quote what a server wrote."""

# Else it escapes brackets in the help for rich, which does not write it.
typer.core.HAS_RICH = False

app = typer.Typer(
    help="Federated, private, parameter-efficient fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    run.simulate,
    run.budget,
    run.doctor,
    search.search,
    server.server,
    client.client,
    status.status,
    export.export,
):
    app.command()(command)
app.add_typer(assets.app, name="assets")
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")
app.add_typer(ledger.app, name="ledger")


def main() -> None:
    """Runs the command; an error is one plain line and exit code 2.

    Exit code 1 is an error that nobody foresaw, 130 an interruption. Of an audit every
    error ends with 4: there 1 and 2 are verdicts.
    """
    expected, unforeseen = (4, 4) if sys.argv[1:2] == ["audit"] else (2, 1)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(expected)
    except click.ClickException as error:
        _fail(error.format_message(), expected)
    except FedpeftError as error:
        _fail(str(error), expected)
    except (click.exceptions.Abort, KeyboardInterrupt):
        hint = "" if sys.argv[1:2] == ["audit"] else " A run goes on with --resume."
        _fail(f"Interrupted.{hint}", 130)
    except OSError as error:
        where = error.filename or "the operating system"
        _fail(f"{error.strerror or error}: {where}.", expected)
    except Exception as error:
        if os.environ.get("FEDPEFT_DEBUG"):
            raise
        kind = type(error).__name__
        _fail(f"Unexpected {kind}: {error} (FEDPEFT_DEBUG=1 shows where).", unforeseen)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> None:
    print(f"Error: {printable(message, _LONGEST)}", file=sys.stderr)
    sys.exit(code)
