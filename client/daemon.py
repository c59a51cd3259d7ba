"""A client that lives for months: agrees once, answers, waits out what will pass."""

import contextlib
import fcntl
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from flwr.app import Message

from client.agreement import Proposal, budget_in_force
from client.app import deliver
from client.connection import run_client
from client.enrolment import (
    Show,
    check_consent,
    check_proposal,
    check_site,
    needed_assets,
    own_data,
)
from client.messages import TrainReply, TrainRequest
from client.settings import ClientSettings
from client.site import open_site
from fedpeft.durable import make_directory
from fedpeft.errors import InvalidPayload, RunError, RunStopped

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
"""Between two tries to store an answer; each wait doubles the last."""

Fetch = Callable[[list[str]], None]
"""Brings what is named, a backbone or a data set, if it is an asset not at hand."""

logger = logging.getLogger(__name__)


def serve(
    settings: ClientSettings,
    *,
    accept: str | None,
    show: Show,
    fetch: Fetch,
    stop: threading.Event,
) -> None:
    """Answers the server until its run is finished, or until `stop` is set.

    Args:
        settings: the client's own.
        accept: hash of the plan that its operator accepts now, written down for ever.
        show: called with a plan that is not accepted.
        fetch: called once the plan is accepted, before anything is loaded.
        stop: ends it after the answer under way.

    Raises:
        NotAccepted: the plan was shown; nothing was loaded or trained.
        FedpeftError: one line that says what stopped it.
    """
    with claimed(settings.client.state):
        daemon = Daemon(settings, accept=accept, show=show, fetch=fetch, stop=stop)
        # Stopped while it waited for the disk: what is unanswered is asked again.
        with contextlib.suppress(RunStopped):
            run_client(settings.client, daemon.agree, daemon.handle, stop=stop)
        if stop.is_set():
            logger.info("stopped", extra=daemon.who)


class Daemon:
    """What a connection calls: :meth:`agree` whenever it stands, then :meth:`handle`.

    **Guarantees**: nothing is loaded, fetched or trained for a plan that the operator
    has not accepted, or beyond the client's own limits.
    """

    def __init__(
        self,
        settings: ClientSettings,
        *,
        accept: str | None,
        show: Show,
        fetch: Fetch,
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._accept = accept
        self._show = show
        self._fetch = fetch
        self._stop = stop
        self._toml = ""
        self.who = {"client": settings.client.name}

    def agree(self, proposal: Proposal, index: int) -> None:
        """Checks what the server proposes and makes ready for it.

        Raises:
            NotAccepted: the plan was shown.
            FedpeftError: if it is beyond the limits, or this site does not fit it.
        """
        self.who |= {"run": proposal.run}
        check_proposal(proposal, index, self._settings.limits)
        check_consent(proposal, self._settings.client, self._accept, self._show)
        self._fetch(needed_assets(proposal.config, self._settings.data))
        torch.set_num_threads(self._settings.client.threads)
        site = open_site(proposal.toml, own_data(self._settings.data))
        check_site(site, proposal, self._settings.client.state)
        self._toml = proposal.toml
        logger.info(
            "plan in force hash=%s epsilon=%.4f budget=%g over all runs",
            proposal.hash,
            proposal.plan.planned_epsilon if proposal.plan else float("inf"),
            budget_in_force(proposal.config, self._settings.limits.budget_epsilon),
            extra=self.who,
        )

    def handle(self, message: Message, index: int) -> Message:
        """Answers one message; while its answer cannot be stored it tries again.

        What failed stands in the line before, by :mod:`client.answer`.

        Raises:
            RunStopped: if it was stopped while it waited. Nothing was sent, and the
                server asks again.
        """
        torch.set_num_threads(self._settings.client.threads)
        wait = FIRST_WAIT_SECONDS
        while True:
            started = time.monotonic()
            reply = deliver(message, {"config": self._toml}, self._node_config(index))
            code, server_round = _code(reply), _round(message)
            extra = {**self.who, "round": server_round, "code": code}
            seconds = time.monotonic() - started
            if code != "storage-failed":
                line = "round=%d code=%s seconds=%.1f"
                logger.info(line, server_round, code, seconds, extra=extra)
                return reply
            line = "round=%d not answered: cannot store the answer; next try in %.0f s"
            logger.warning(line, server_round, wait, extra=extra)
            if self._stop.wait(wait):
                raise RunStopped(f"Stopped before round {server_round} was answered.")
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _node_config(self, index: int) -> dict[str, str | int | float]:
        budget = self._settings.limits.budget_epsilon
        return {
            "partition-id": index,
            "data": own_data(self._settings.data),
            "state": str(self._settings.client.state),
            **({} if budget is None else {"budget-epsilon": budget}),
        }


@contextlib.contextmanager
def claimed(state: Path) -> Iterator[None]:
    """Holds a state directory for this process.

    Raises:
        RunError: if another process holds it: two of one name would take turns in
            ending each other's connection.
    """
    make_directory(state)
    with (state / "client.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"Another client is running in {state}: end it first, or give this one "
                "a state directory of its own."
            ) from None
        for rest in state.rglob(".partial-*"):  # of a process that was killed
            rest.unlink()
        yield


def _round(message: Message) -> int:
    """Returns the round of a request; -1 of something else."""
    try:
        if message.has_error():
            return -1
        return TrainRequest.from_record(message.content).server_round
    except InvalidPayload:
        return -1


def _code(reply: Message) -> str:
    """Returns the code of a train reply; of another reply whether it is an error."""
    try:
        if reply.has_error():
            return "failed"
        return TrainReply.from_record(reply.content).code
    except InvalidPayload:
        return "ok"
