"""The command line: the only room that knows all of the others.

One file a group of commands. Heavy modules are imported inside the commands, so that
``--help`` and a wrong key answer at once.
"""

import os
import sys

import click
import typer

from fedpeft.cli import (
    assets,
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
app.add_typer(keys.app, name="keys")
app.add_typer(ledger.app, name="ledger")


def main() -> None:
    """Runs the command; an error is one plain line and exit code 2.

    Exit code 1 is an error that nobody foresaw, 130 an interruption.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except FedpeftError as error:
        _fail(str(error))
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("Interrupted. A run goes on with --resume.", code=130)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or 'the operating system'}.")
    except Exception as error:
        if os.environ.get("FEDPEFT_DEBUG"):
            raise
        kind = type(error).__name__
        _fail(f"Unexpected {kind}: {error} (FEDPEFT_DEBUG=1 shows where).", code=1)
    sys.exit(code or 0)


def _fail(message: str, code: int = 2) -> None:
    print(f"Error: {printable(message, _LONGEST)}", file=sys.stderr)
    sys.exit(code)
