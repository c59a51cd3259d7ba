"""The one object through which a client's data leave it.

It holds the plan, the sampler, the noise, the ledger and the outbox; nothing else can
emit bytes. An answer is computed once for a request, charged once, and repeated byte
for byte whenever the same request comes again.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fedpeft.errors import LedgerError, PrivacyBudgetExceeded
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.ledger import (
    REMEDY,
    SEEDED,
    Entry,
    Ledger,
    locked,
    open_ledger,
)
from fedpeft.privacy.outbox import Outbox, Record, unrecorded
from fedpeft.privacy.plan import Plan
from fedpeft.privacy.randomness import (
    Randomness,
    SeededRandomness,
    noised,
    poisson_batch,
)
from fedpeft.tensors import Tensors


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

    **Guarantees**: what :meth:`commit` returns is on disk together with the next
    error-feedback memory, and charged, before it can be sent. (That the payload was
    made from these batches and this noise is the caller's part: here calls are
    counted.) A release past the plan's cap, or past the budget counted over all runs in
    the ledger, is refused before any data are read. The batches are Poisson at the
    plan's rate and the noise has the plan's standard deviation, once a step, or nothing
    is released.
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
        self._randomness = randomness
        self._backbone = backbone
        self._budget_epsilon = budget_epsilon
        self._batches_drawn = 0
        self._noises_drawn = 0

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
                f"{REMEDY} Then start a new run."
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

    def authorise(self, run: str) -> None:
        """Checks that the plan allows one more round.

        Raises:
            PrivacyBudgetExceeded: if it does not.
        """
        plan = self._plan
        if plan is None:
            return
        entries = self._ledger.entries
        foreign = {entry.unit for entry in entries} - {plan.unit, "none"}
        if foreign:
            raise PrivacyBudgetExceeded(
                f"The ledger of {self._ledger.data_source} holds releases of unit "
                f"{foreign.pop()!r}; epsilons of different units are never added."
            )
        seeded = any(entry.mechanism == SEEDED for entry in entries)
        if seeded and self._mechanism != SEEDED:
            raise PrivacyBudgetExceeded(
                f"The ledger of {self._ledger.data_source} holds releases with seeded "
                "noise, which whoever knows the seed can remove: nothing can be "
                "promised for these data any more."
            )
        if sum(entry.run == run for entry in entries) >= plan.max_participations:
            raise PrivacyBudgetExceeded(
                f"The plan allows {plan.max_participations} rounds a client, and "
                f"{self._ledger.data_source} has had them."
            )
        history = [entry.composition for entry in entries]
        budget = self._budget_epsilon or plan.target_epsilon
        after = epsilon([*history, plan.composition()], plan.target_delta)
        if after > budget:
            raise PrivacyBudgetExceeded(
                f"One more round would bring {self._ledger.data_source} to epsilon "
                f"{after:.3f}, past its budget of {budget:g}."
            )

    @property
    def _mechanism(self) -> str:
        if self._plan is None or not self._plan.noise_multiplier:
            return "none"
        is_seeded = isinstance(self._randomness, SeededRandomness)
        return SEEDED if is_seeded else "gaussian"

    def residual(self, run: str) -> Tensors:
        """Returns the error-feedback memory of a run; empty before its first answer."""
        record = self._outbox.newest(run)
        return record.residual if record else {}

    def mask_seed(self) -> int:
        """Returns a seed for dropout masks that depends on nothing an adversary knows.

        One more example shifts every other's mask. That costs no privacy only if masks
        are random and independent of the batch; under a public seed they are not.
        """
        return int(self._randomness.uniform(1).item() * 2**53)

    def batches(self, num_examples: int) -> Iterator[list[int]]:
        """Yields one Poisson batch of indices for each local step of the plan."""
        if self._plan is None:
            raise ValueError(
                "Expected a plan: without one there are no Poisson batches."
            )
        for _ in range(self._plan.local_steps):
            self._batches_drawn += 1
            rate = self._plan.sampling_rate
            yield poisson_batch(num_examples, rate, self._randomness)

    def noise(self, total: torch.Tensor, standard_deviation: float) -> torch.Tensor:
        """Returns `total` with Gaussian noise; a :data:`~fedpeft.interfaces.NoiseFn`.

        Raises:
            ValueError: if the standard deviation is not the plan's.
        """
        plan = self._plan
        planned = plan.noise_multiplier * plan.clipping_norm if plan else 0.0
        if standard_deviation != planned:
            raise ValueError(f"Expected noise of {planned}, got {standard_deviation}.")
        self._noises_drawn += 1
        return noised(total, standard_deviation, self._randomness)

    def commit(self, question: Question, payload: bytes, residual: Tensors) -> Answer:
        """Makes an answer final: outbox, then ledger, each on disk before the next.

        Raises:
            ValueError: if the batches or the noise were not the plan's.
            OSError: if the disk is full; then nothing may be sent.
        """
        self._check_steps()
        entry = dataclasses.replace(
            self._entry(question),
            payload_hash=hashlib.sha256(payload).hexdigest(),
        ).sealed(self._ledger.head)
        self._outbox.put(Record(entry, payload, residual))
        self._ledger.append(entry)
        return self._answer(payload)

    def forfeit(self, question: Question) -> None:
        """Charges a round whose batches were drawn and which failed before its end.

        Whether it failed may depend on the noised gradients, and asking again would
        draw them anew. The stored answer is empty.
        """
        if self._batches_drawn:
            entry = self._entry(question).sealed(self._ledger.head)
            residual = self.residual(question.run)
            self._outbox.put(Record(entry, b"", residual))
            self._ledger.append(entry)

    def discard(self, run: str, until_round: int) -> None:
        """Deletes answers that the server will not ask for again."""
        self._outbox.discard(run, until_round)

    def _answer(self, payload: bytes) -> Answer:
        return Answer(payload, len(self._ledger.entries), self._ledger.head)

    def _check_steps(self) -> None:
        planned = self._plan.local_steps if self._plan else 0
        drawn = (self._batches_drawn, self._noises_drawn)
        if self._plan and drawn != (planned, planned):
            raise ValueError(
                f"Expected {planned} batches and {planned} noises as planned, got "
                f"{drawn[0]} and {drawn[1]}: nothing is released."
            )

    def _entry(self, question: Question) -> Entry:
        plan = self._plan
        return Entry(
            run=question.run,
            round=question.server_round,
            data_source=self._ledger.data_source,
            unit=plan.unit if plan else "none",
            relation=plan.relation if plan else "none",
            mechanism=self._mechanism,
            noise_multiplier=plan.noise_multiplier if plan else 0.0,
            sampling_rate=plan.sampling_rate if plan else 1.0,
            steps=plan.local_steps if plan else 1,
            clipping_norm=plan.clipping_norm if plan else None,
            backbone=self._backbone,
            plan_hash=plan.hash if plan else "",
            request_hash=question.request_hash,
            payload_hash="",
        )
