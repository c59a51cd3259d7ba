"""One request, one answer: check, train, compress, commit."""

import errno
import logging
import shutil
from pathlib import Path

from client.agreement import budget_in_force
from client.holding import Holding
from client.messages import Code, TrainReply, TrainRequest
from client.site import Site
from client.suspicion import suspicion
from client.update import make_update, open_randomness
from fedpeft.errors import FedpeftError, LedgerError, PrivacyBudgetExceeded
from fedpeft.privacy import (
    ENROLMENT,
    Question,
    Release,
    RequestConflict,
    open_release,
)
from fedpeft.tensors import flatten

_ROOM_BYTES = 1 << 20
"""For the ledger, its head and the file system itself, beside an answer."""

_RESTORED = (
    "Was this state directory restored from a backup, or is it a copy? What has been "
    "released since is not in it, and going on would spend that privacy again."
)

logger = logging.getLogger(__name__)


def answer(
    site: Site,
    client: int,
    state: Path,
    request: TrainRequest,
    *,
    budget_epsilon: float | None = None,
    suspects: bool = True,
) -> TrainReply:
    """Answers a train request, or refuses it with a code.

    **Guarantees**: an answer with the code ``storage-failed`` released nothing. Asked
    again once the disk has room, the client answers as if for the first time, or, if
    the answer was on disk already, with its bytes; either way it is charged once.

    Args:
        site: what the process keeps warm.
        client: index of the client.
        state: the client's own state directory.
        request: as received; nothing in it is believed.
        budget_epsilon: over all runs, as this client limits it; the plan's own budget
            holds beside it.
        suspects: whether a state that looks crafted is refused; an auditor whose own
            victims these are looks at what would happen otherwise.
    """
    mismatch = _mismatch(site, request)
    if mismatch:
        return _refuse(client, request, mismatch, "the server's copy is another one")
    if site.plan is None and budget_epsilon is not None:
        reason = f"a run without privacy exceeds the limit of {budget_epsilon:g}"
        return _refuse(client, request, "budget-spent", reason)
    try:
        site.check_state(state)
        holding = site.holding(client)
        with (
            open_randomness(site, client, request.server_round) as randomness,
            open_release(
                state,
                holding.source,
                plan=site.plan,
                randomness=randomness,
                backbone=site.model.fingerprint,
                budget_epsilon=budget_in_force(site.config, budget_epsilon),
            ) as release,
        ):
            if request.server_round == ENROLMENT:
                return _join(release, request)
            crafted = suspicion(site, request) if suspects else None
            if crafted:
                return _refuse(client, request, "state-refused", crafted)
            return _answer(site, client, state, holding, release, request)
    except RequestConflict as error:
        return _refuse(client, request, "request-conflict", str(error))
    except LedgerError as error:
        return _refuse(client, request, "ledger-refused", str(error))
    except PrivacyBudgetExceeded as error:
        return _refuse(client, request, "budget-spent", str(error))
    except FedpeftError as error:
        return _refuse(client, request, "failed", str(error))
    except OSError as error:
        return _refuse(client, request, "storage-failed", _failure(error, state))


def _join(release: Release, request: TrainRequest) -> TrainReply:
    _confirm(release, request)
    question = Question(request.run, request.server_round, request.hash)
    final = release.enrol(question)
    return TrainReply("ok", final.payload, final.ledger_length, final.ledger_head)


def _answer(
    site: Site,
    client: int,
    state: Path,
    holding: Holding,
    release: Release,
    request: TrainRequest,
) -> TrainReply:
    question = Question(request.run, request.server_round, request.hash)
    _confirm(release, request)
    final = release.repeat(question)
    if final is None:
        release.authorise(question)
        _check_room(site, state, request)
        try:
            payload, memory = make_update(site, client, holding, release, request)
        except Exception:
            release.forfeit(question)
            raise
        final = release.commit(question, payload.to_bytes(), memory)
    release.discard(request.run, request.durable_round)
    return TrainReply(
        "ok" if final.payload else "failed",
        final.payload,
        final.ledger_length,
        final.ledger_head,
        num_examples=-1 if site.plan else len(holding.examples),
    )


def _confirm(release: Release, request: TrainRequest) -> None:
    """Compares the ledger with what the server has been told of it; else explains."""
    try:
        release.confirm(request.ledger_length, request.ledger_head)
    except LedgerError as error:
        raise LedgerError(f"{error} {_RESTORED}") from None


def _check_room(site: Site, state: Path, request: TrainRequest) -> None:
    """Refuses to begin what the disk could not hold in the end.

    An answer that does not fit is drawn anew later, and whether it fits depends on its
    length, which depends on data. So a full disk is noticed before any are read.

    Raises:
        OSError: says how much room there is.
    """
    # The payload and the error-feedback memory, each at most about as long as the dense
    # state, and what stays here: twice, for what replaces a file.
    kept = 4 * flatten(site.model.local_start).numel()
    needed = 4 * len(request.state) + 2 * kept + _ROOM_BYTES
    free = shutil.disk_usage(state).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"Expected {needed} bytes free, found {free}", str(state)
        )


def _failure(error: OSError, state: Path) -> str:
    """Returns what failed and where, and nothing else that an error may say."""
    reason = error.strerror or type(error).__name__
    return f"{reason}: {error.filename or state}"


def _mismatch(site: Site, request: TrainRequest) -> Code | None:
    """Compares the request with the client's own copy of what was agreed."""
    plan_hash = site.plan.hash if site.plan else ""
    if (request.config_hash, request.plan_hash) != (site.config.hash, plan_hash):
        return "config-mismatch"
    if site.config.run.id not in (None, request.run):
        return "config-mismatch"
    first = ENROLMENT if site.plan and site.plan.is_secret else 1
    if not first <= request.server_round <= site.config.run.rounds:
        return "config-mismatch"
    if request.backbone != site.model.fingerprint:
        return "backbone-mismatch"
    return None


def _refuse(client: int, request: TrainRequest, code: Code, reason: str) -> TrainReply:
    logger.warning(
        "client=%d round=%d refused=%s: %s",
        client,
        request.server_round,
        code,
        reason,
        extra={"run": request.run, "round": request.server_round, "code": code},
    )
    return TrainReply(code)
