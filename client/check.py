"""``fedpeft client --check``: is all in place? Nothing is spent, nothing is kept."""

import contextlib
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from flwr.app import Message

from client import findings
from client.agreement import AcceptedPlans, Proposal
from client.connection import run_client
from client.daemon import Fetch, claimed
from client.enrolment import check_proposal, check_site, needed_assets, own_data
from client.settings import ClientSection, ClientSettings
from client.site import Site, open_site
from client.suspicion import exposure
from fedpeft import assets
from fedpeft.doctor import Finding
from fedpeft.errors import FedpeftError, RunError
from fedpeft.wording import printable

PATIENCE_SECONDS = 20.0
"""For the server to answer."""

_LONGEST = 500
"""Letters of a finding: it may quote what the server wrote."""

_FILES = frozenset({"public", "keys"})
"""Options of ``[peft]`` that name a file."""

T = TypeVar("T")


def examine(settings: ClientSettings, fetch: Fetch) -> list[Finding]:
    """Looks at everything; if one thing is broken, at the others all the same.

    **Guarantees**: nothing is trained on but in memory, and nothing is released or
    charged. Nothing leaves this machine but what a client says when it connects. Data
    and backbone are left alone for a plan beyond the limits; and before the operator's
    consent, no path or address that the server chose is looked at.

    Args:
        settings: the client's own.
        fetch: brings assets that the plan needs.
    """
    state = settings.client.state
    try:
        with claimed(state):
            check = _Check(settings, fetch)
            return [
                _finding("keys", lambda: findings.find_keys(settings.client)),
                _finding("connection", check.connection),
                _finding("limits", check.limits),
                _finding("consent", check.consent),
                _finding("assets", check.assets),
                _finding("data", check.data),
                _finding("backbone", check.backbone),
                _finding("exposure", check.exposure),
                _finding("step", check.step),
                _finding("ledger", lambda: findings.find_ledger(state)),
                _finding("budget", check.budget),
                _finding("disk", lambda: findings.find_disk(state)),
            ]
    except (RunError, OSError) as error:
        return [Finding("state directory", False, str(error))]


def _finding(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, printable(look(), _LONGEST))
    except Exception as error:  # whatever it is, the other things are looked at too
        reason = printable(str(error), _LONGEST) or type(error).__name__
        return Finding(what, False, reason)


class _Check:
    """What the checks hand on to each other: the proposal, then the site."""

    def __init__(self, settings: ClientSettings, fetch: Fetch) -> None:
        self._settings = settings
        self._fetch = fetch
        self._received: tuple[Proposal, int] | None = None
        self._within: Proposal | None = None
        self._agreed: Proposal | None = None
        self._opened: Site | None = None

    @property
    def _proposal(self) -> Proposal:
        return _needed(self._received, "the server's plan")[0]

    def connection(self) -> str:
        self._received = receive_proposal(self._settings.client)
        server, name = self._settings.client.server, self._settings.client.name
        return f"{server} knows {name} and proposes a plan"

    def limits(self) -> str:
        proposal, index = _needed(self._received, "the server's plan")
        check_proposal(proposal, index, self._settings.limits)
        self._within = proposal
        return f"plan {proposal.hash} is within them"

    def consent(self) -> str:
        hash_, section = self._proposal.hash, self._settings.client
        if section.accept not in (None, hash_):
            raise RunError(f"[client] accept names another plan, {section.accept}.")
        if section.accept or AcceptedPlans(section.state).holds(hash_):
            self._agreed = self._proposal
            return "given"
        return "not yet: a start without --accept shows the plan"

    def _permitted(
        self, *, backbone: bool = False, data: bool = False, method: bool = False
    ) -> Proposal:
        """Returns the plan, if backbone, data or a method's file may be loaded.

        A path or a hub's address that the server chose takes the operator's consent;
        what this release pins does not, nor does the client's own file.
        """
        config, own = self._proposal.config, self._settings.data
        _needed(self._within, "a plan within the limits")
        is_chosen = (
            (backbone and config.model.backbone not in assets.catalogue())
            or (data and own.path is None and config.data.path is not None)
            or (method and not _FILES.isdisjoint(config.peft.options))
        )
        if is_chosen:
            _needed(self._agreed, "the operator's consent")
        return self._proposal

    def assets(self) -> str:
        proposal = self._permitted(backbone=True)
        names = needed_assets(proposal.config, self._settings.data)
        self._fetch(names)
        return f"{', '.join(names)}: at hand"

    def data(self) -> str:
        proposal = self._permitted(data=True)
        return findings.find_data(proposal.config, self._settings.data)

    def backbone(self) -> str:
        proposal = self._permitted(backbone=True, data=True, method=True)
        site = open_site(proposal.toml, own_data(self._settings.data))
        check_site(site, proposal, self._settings.client.state)
        self._opened = site
        return f"fingerprint {site.model.fingerprint[:16]}, as the server's"

    def exposure(self) -> str:
        return exposure(_needed(self._opened, "data and backbone"))

    def step(self) -> str:
        site = _needed(self._opened, "data and backbone")
        torch.set_num_threads(self._settings.client.threads)
        return findings.find_step(site, self._settings.client.state)

    def budget(self) -> str:
        state = self._settings.client.state
        return findings.find_budget(self._proposal, self._settings.limits, state)


def _needed(found: T | None, what: str) -> T:
    if found is None:
        raise RunError(f"Not looked at: it takes {what}.")
    return found


class _Enough(FedpeftError):
    """The proposal is here; the connection may end."""


def receive_proposal(section: ClientSection) -> tuple[Proposal, int]:
    """Connects, takes what the server proposes, and leaves.

    Raises:
        RunError: if the server refuses this client, or does not answer in time.
    """
    received: list[tuple[Proposal, int]] = []

    def agree(proposal: Proposal, index: int) -> NoReturn:
        received.append((proposal, index))
        raise _Enough("enough")

    def handle(message: Message, index: int) -> NoReturn:
        raise RunError(f"Expected no request to client {index} yet.")

    stop = threading.Event()
    timer = threading.Timer(PATIENCE_SECONDS, stop.set)
    timer.start()
    try:
        with contextlib.suppress(_Enough):
            run_client(section, agree, handle, stop=stop)
    finally:
        timer.cancel()
    if not received:
        raise RunError(
            f"Expected an answer of {section.server} within {PATIENCE_SECONDS:g} s, "
            "got none; the log says what was tried."
        )
    return received[0]
