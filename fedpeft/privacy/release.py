"""The one object through which a client's data leave it.

It holds the plan, the sampler, the noise, the ledger and the outbox; nothing else can
emit bytes. An answer is computed once for a request, charged once, and repeated byte
for byte whenever the same request comes again.
"""

import contextlib
import dataclasses
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import LedgerError, PrivacyBudgetExceeded
from fedpeft.privacy.accountant import Composition
from fedpeft.privacy.authorisation import authorise, price
from fedpeft.privacy.draws import Draws
from fedpeft.privacy.ledger import (
    REMEDY,
    SEEDED,
    TRUSTED_SERVER,
    Entry,
    Ledger,
    locked,
    open_ledger,
)
from fedpeft.privacy.outbox import NOTHING, Memory, Outbox, Record, unrecorded
from fedpeft.privacy.plan import Plan
from fedpeft.privacy.randomness import Randomness

ENROLLED = b"enrolled"
"""What a client answers when it has joined a run."""


class RequestConflict(LedgerError):
    """A round that was answered is asked again with another request."""


@dataclass(frozen=True)
class Question:
    """What is to be answered: the key under which an answer is kept."""

    run: str
    server_round: int
    request_hash: str


@dataclass(frozen=True)
class Answer:
    """What may be sent.

    Attributes:
        payload: the bytes.
        ledger_length: entries in the client's ledger, for the acknowledgement.
        ledger_head: its newest hash.
    """

    payload: bytes
    ledger_length: int
    ledger_head: str


@contextlib.contextmanager
def open_release(
    state: Path,
    data_source: str,
    *,
    plan: Plan | None,
    randomness: Randomness,
    backbone: str,
    budget_epsilon: float | None = None,
) -> Iterator["Release"]:
    """Locks the data source, verifies its ledger and repairs what a crash left.

    Args:
        state: the client's own state directory.
        data_source: names the data over all runs.
        plan: what a round may release; None for a run without privacy.
        randomness: of the Poisson batches and of the noise.
        backbone: fingerprint for the ledger.
        budget_epsilon: over all runs; None allows the plan's target.

    Raises:
        LedgerError: if the ledger is missing, shorter than it was, or altered.
    """
    with locked(state, data_source):
        outbox = Outbox(state, data_source)
        records = outbox.records()
        ledger = open_ledger(state, data_source, expected=bool(records))
        for record in unrecorded(ledger, records):
            ledger.append(record.entry)
        yield Release(ledger, outbox, plan, randomness, backbone, budget_epsilon)


class Release:
    """One data source, open for one request; see :func:`open_release`.

    **Guarantees**: what :meth:`commit` returns is on disk together with the
    client's next memory, and charged, before it can be sent. (That the payload was
    made from these batches and this noise is the caller's part: here calls are
    counted.) A release past the plan's cap, or past the budget counted over all runs in
    the ledger, is refused before any data are read. The batches are Poisson at the
    plan's rate and the noise has the plan's standard deviation, once a step, or nothing
    is released. (For the unit ``client`` the server clips and adds the noise: what goes
    out here is not private by itself, and the ledger says ``trusted-server``.)

    Attributes:
        draws: the batches and the noise of this answer.
    """

    def __init__(
        self,
        ledger: Ledger,
        outbox: Outbox,
        plan: Plan | None,
        randomness: Randomness,
        backbone: str,
        budget_epsilon: float | None,
    ) -> None:
        self._ledger = ledger
        self._outbox = outbox
        self._plan = plan
        self.draws = Draws(plan, randomness)
        self._backbone = backbone
        self._budget_epsilon = budget_epsilon

    def confirm(self, length: int, head: str) -> None:
        """Checks the ledger against what the server was told when it last answered.

        Raises:
            LedgerError: if that entry is not in the ledger any more.
        """
        entries = self._ledger.entries
        if length and (len(entries) < length or entries[length - 1].hash != head):
            raise LedgerError(
                f"The ledger of {self._ledger.data_source} is not the one that was "
                f"acknowledged with {length} entries: it was lost or restored. "
                f"{REMEDY} With --acknowledged {length} it charges what is missing. "
                "Then start a new run."
            )

    def repeat(self, question: Question) -> Answer | None:
        """Returns the stored answer to a question asked before, None for a new one.

        Raises:
            RequestConflict: if the round was answered to another request.
        """
        of_round = [
            entry
            for entry in self._ledger.entries
            if (entry.run, entry.round) == (question.run, question.server_round)
        ]
        if not of_round:
            return None
        if of_round[-1].request_hash != question.request_hash:
            raise RequestConflict(
                f"Round {question.server_round} was answered to another request: a "
                "second answer would spend privacy twice. Was the server restored from "
                "an older checkpoint?"
            )
        record = self._outbox.find(question.run, question.server_round)
        if record is None:
            raise RequestConflict(
                f"The answer of round {question.server_round} was acknowledged and is "
                "not kept any more."
            )
        if record.entry != of_round[-1]:
            raise LedgerError(
                f"The stored answer of round {question.server_round} is not the one "
                f"that was charged. {REMEDY}"
            )
        return self._answer(record.payload)

    def authorise(self, question: Question) -> None:
        """Checks that plan and ledger allow the answer.

        Raises:
            PrivacyBudgetExceeded: if they do not.
        """
        if self._plan is None:
            return
        try:
            authorise(
                self._plan,
                self._ledger.entries,
                question.run,
                question.server_round,
                is_seeded=self.draws.is_seeded,
                budget_epsilon=self._budget_epsilon,
            )
        except PrivacyBudgetExceeded as error:
            source = self._ledger.data_source
            raise PrivacyBudgetExceeded(f"{source}: {error}") from None

    def enrol(self, question: Question) -> Answer:
        """Charges a run with secret cohorts, whole, before its first round; once.

        Nothing is released by it: the charge is all there is.

        Raises:
            PrivacyBudgetExceeded: if plan and ledger do not allow the run.
        """
        known = [e for e in self._ledger.entries if e.run == question.run]
        if not known:
            self.authorise(question)
            self._ledger.append(self._entry(question).sealed(self._ledger.head))
        elif known[0].request_hash != question.request_hash:
            raise RequestConflict("The run was joined by another request.")
        return self._answer(ENROLLED)

    @property
    def _mechanism(self) -> str:
        if self._plan is None or not self._plan.noise_multiplier:
            return "none"
        if self.draws.is_seeded:
            return SEEDED
        return "gaussian" if self._plan.is_dp_sgd else TRUSTED_SERVER

    def memory(self, run: str) -> Memory:
        """Returns the client's memory of a run; empty before its first answer."""
        record = self._outbox.newest(run)
        return record.memory if record else NOTHING

    def commit(self, question: Question, payload: bytes, memory: Memory) -> Answer:
        """Makes an answer final: outbox, then ledger, each on disk before the next.

        Raises:
            ValueError: if the batches or the noise were not the plan's.
            OSError: if the disk is full; then nothing may be sent.
        """
        self.draws.check()
        entry = dataclasses.replace(
            self._entry(question),
            payload_hash=hashlib.sha256(payload).hexdigest(),
        ).sealed(self._ledger.head)
        self._outbox.put(Record(entry, payload, memory))
        self._ledger.append(entry)
        return self._answer(payload)

    def forfeit(self, question: Question) -> None:
        """Charges a round whose batches were drawn and which failed before its end.

        Whether it failed may depend on the noised gradients, and asking again would
        draw them anew. The stored answer is empty.
        """
        if self.draws.has_begun:
            entry = self._entry(question).sealed(self._ledger.head)
            self._outbox.put(Record(entry, b"", self.memory(question.run)))
            self._ledger.append(entry)

    def discard(self, run: str, until_round: int) -> None:
        """Deletes answers that the server will not ask for again."""
        self._outbox.discard(run, until_round)

    def forget(self, run: str) -> None:
        """Deletes the answers and the memory of a run that is over.

        **Guarantees**: the ledger keeps its entries, and an answer that is not in it
        yet stays, which the next opening will charge.
        """
        known = {entry.hash for entry in self._ledger.entries}
        self._outbox.forget(run, known)

    def _answer(self, payload: bytes) -> Answer:
        return Answer(payload, len(self._ledger.entries), self._ledger.head)

    def _entry(self, question: Question) -> Entry:
        plan = self._plan
        if plan is None:
            done, unit, relation = Composition(0.0, 1.0, 1), "none", "none"
        else:
            done = price(plan, self._ledger.entries, question.run)
            unit, relation = plan.unit, plan.relation
        return Entry(
            run=question.run,
            round=question.server_round,
            data_source=self._ledger.data_source,
            unit=unit,
            relation=relation,
            mechanism=self._mechanism,
            noise_multiplier=done.noise_multiplier,
            sampling_rate=done.sampling_rate,
            steps=done.steps,
            clipping_norm=plan.clipping_norm if plan else None,
            backbone=self._backbone,
            plan_hash=plan.hash if plan else "",
            request_hash=question.request_hash,
            payload_hash="",
            nonce=secrets.token_hex(16),
        )
