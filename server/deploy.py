"""One run over gRPC: from its start, or from where it stands, to its end."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from client.agreement import Proposal
from client.connection import LONGEST_PAUSE_SECONDS
from client.flower import set_identity
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.menus import check_variants
from fedpeft.model import shared_state
from fedpeft.tensors import flatten
from server.allowlist import AllowList
from server.app import begin, run_to_the_end
from server.checkpoint import Progress
from server.grid import GrpcGrid
from server.monitor import Monitor
from server.rundir import claimed, resolve
from server.runtime import Runtime
from server.settings import ServerSection
from server.setup import Server, open_server
from server.slots import Slots
from server.status import StatusPage

STOP_SECONDS = 60.0
"""That the round under way may still take once the server is asked to stop.

If that is not enough, nothing is lost either: clients keep their answers, and are asked
again when the server is back.
"""


LEAVE_SECONDS = LONGEST_PAUSE_SECONDS + 15.0
"""For clients that are away to come back, and hear that the run is complete."""

logger = logging.getLogger(__name__)


def deploy(
    section: ServerSection,
    config: RunConfig,
    stop: threading.Event,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Serves a run to its end and returns the content of ``result.json``.

    Whatever ended an earlier process, the same call goes on from the last complete
    round; clients answer the round that was under way with the same bytes.

    Args:
        section: the server's own settings.
        config: the scenario, as read.
        stop: once set, the round under way is the last of this process.
        say: is told where the server listens and what its clients must accept.

    Raises:
        RunStopped: if it was asked to stop before the last round.
        FedpeftError: one line that says what stopped the run.
    """
    check_variants(config)
    _check_reach(section, config)
    with claimed(section.output):
        resume = (section.output / "config.toml").exists()
        config = resolve(config, section.output, resume=resume)
        set_identity()
        server = open_server(config, section.output, Runtime(held_out=section.held_out))
        progress = begin(server, resume=True)
        proposal = Proposal(server.run, config.to_toml(), server.model.fingerprint)
        allow = AllowList(section.allow)
        slots = Slots(
            section.output / "server" / "clients.json",
            allow,
            config.partition.num_clients,
            is_expected=progress.server_round > 0,
        )
        grid = GrpcGrid(section, proposal, allow, slots, _largest_reply(server))
        monitor = Monitor(server, grid, stop.is_set)
        runtime = Runtime(
            deadline_seconds=section.deadline_seconds,
            busy=lambda: grid.busy() | slots.revoked(),
            connections=grid.connections,
            name=slots.name,
            late=lambda: grid.counts().get("late", 0),
            should_stop=stop.is_set,
            watch=monitor.watch,
        )
        threading.Thread(target=_hurry, args=(grid, stop), daemon=True).start()
        server = replace(server, runtime=runtime)
        return _serve(section, server, progress, grid, monitor, say)


def _serve(
    section: ServerSection,
    server: Server,
    progress: Progress,
    grid: GrpcGrid,
    monitor: Monitor,
    say: Callable[[str], None],
) -> dict[str, Any]:
    page, finished = None, False
    try:
        if section.status_port is not None:
            page = StatusPage(
                monitor.snapshot, section.status_host, section.status_port
            )
            say(f"Status page: http://{section.status_host}:{page.start()}/")
        port = grid.start()
        say(f"Listening on {section.address.rpartition(':')[0]}:{port}")
        say(f"Plan for clients to accept: {grid.proposal.hash}")
        result = run_to_the_end(grid, server, progress)
        monitor.state, finished = "complete", True
        _take_leave(grid, monitor.took_part, server.runtime.should_stop)
        return result
    finally:
        grid.close(finished=finished)
        if page is not None:
            page.close()


def _take_leave(
    grid: GrpcGrid, clients: set[int], should_stop: Callable[[], bool]
) -> None:
    """Tells clients that the run is complete; waits for those that are away.

    A server that has just been started again is there before any of them.
    """
    grid.finish()
    patience = time.monotonic() + LEAVE_SECONDS
    while grid.untold(clients) and not should_stop() and time.monotonic() < patience:
        time.sleep(0.05)
    if away := grid.untold(clients):
        logger.warning("away at the end, not told of it: %s", ", ".join(away))


def _hurry(grid: GrpcGrid, stop: threading.Event) -> None:
    """Ends the wait for clients some time after the server is asked to stop."""
    stop.wait()
    time.sleep(STOP_SECONDS)
    grid.stop_waiting()


def _check_reach(section: ServerSection, config: RunConfig) -> None:
    """Refuses what the settings promise to nobody."""
    if config.run.state is not None:
        raise ConfigError(
            "[run] state: expected none in a deployment, where every client keeps its "
            f"ledger itself, got {config.run.state!r}."
        )


def _largest_reply(server: Server) -> int:
    """Returns a bound on an answer's bytes: no codec makes more than twice fp32."""
    dense = 4 * flatten(shared_state(server.model)).numel()
    return 2 * dense + (1 << 16)
