"""How a run looks on a terminal: a progress bar, a line a round, a table at the end."""

import logging
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class RoundReporter:
    """Shows the rounds as the server logs them, as long as it is entered.

    Args:
        rounds: how many there will be.
        console: a terminal gets a bar; anything else plain lines.
    """

    def __init__(self, rounds: int, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.quiet,
        )
        self._task = self._bar.add_task("rounds", total=rounds)
        self._handler = _Handler(self._show)

    def __enter__(self) -> "RoundReporter":
        logger = logging.getLogger("server")
        logger.setLevel(logging.INFO)
        logger.propagate = False  # libraries hang handlers of their own on the root
        logger.addHandler(self._handler)
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        logging.getLogger("server").removeHandler(self._handler)

    def _show(self, log: logging.LogRecord) -> None:
        record: dict[str, Any] | None = getattr(log, "record", None)
        if record is None:
            self._console.print(log.getMessage(), highlight=False, soft_wrap=True)
            return
        metric = record["metric"]
        clients, sent = "clients hidden", ""
        if record["replies"] is not None:
            clients = f"{record['replies']}/{record['cohort_size']} clients"
            sent = f"{record['bytes_up']:>9,} bytes up  {record['seconds']:.1f} s"
        name = log.__dict__["metric"]
        line = (
            f"round {record['round']:>3}  {clients}  "
            f"{name} {'     -' if metric is None else f'{metric:.4f}'}  "
            f"{sent}"
        )
        self._console.print(line, highlight=False, soft_wrap=True)
        self._bar.update(self._task, completed=record["round"])


class _Handler(logging.Handler):
    def __init__(self, show: Any) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record)


def result_table(result: dict[str, Any]) -> Table:
    """Returns the short table that ends a run."""
    privacy, sent = result["privacy"], result["communication"]
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    value = result["final"]["value"]
    table.add_row(result["final"]["metric"], "-" if value is None else f"{value:.4f}")
    if privacy["unit"] == "none":
        table.add_row("privacy", "none")
    else:
        unit = f"{privacy['unit']}, {privacy['relation']}"
        table.add_row("unit of privacy", unit)
        table.add_row("holds against", privacy["holds_against"])
        table.add_row("epsilon planned", f"{privacy['planned_epsilon']:.4f}")
        table.add_row("epsilon spent, worst client", f"{privacy['spent_epsilon']:.4f}")
        table.add_row("  over", privacy["spent_over"])
        table.add_row("delta", f"{privacy['target_delta']:g}")
        if privacy["noise"] == "seeded":
            warning = "seeded: whoever knows the seed can remove it"
            table.add_row("[red]noise[/red]", f"[red]{warning}[/red]")
    table.add_row("trainable parameters", f"{result['trainable_parameters']:,}")
    if sent["bytes_up"] is not None:  # at client level it would count the clients
        table.add_row("bytes up", f"{sent['bytes_up']:,}")
        table.add_row("times less than dense fp32", f"{sent['ratio']:.1f}")
        table.add_row("seconds", f"{result['seconds']:.0f}")
    return table
