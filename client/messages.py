"""The vocabulary of server and client, as Flower messages carry it.

A request holds the server's trainable state; a reply holds a compressed update or a
refusal code. Everything else about a client's data stays at the
client; without privacy its number of examples travels too.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Literal, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedpeft.errors import InvalidPayload

Code = Literal[
    "ok",
    "budget-spent",
    "ledger-refused",
    "request-conflict",
    "config-mismatch",
    "backbone-mismatch",
    "state-refused",
    "storage-failed",
    "failed",
]
"""All that a client says about why it does not answer; the reason stays in its log."""

_BYTES = "fedpeft.bytes.v1"
_HEAD = "[0-9a-z]{0,64}"
_MOST = 2**53
"""Numbers stay below it, and so are exact as doubles too."""
_LONGEST = 60
"""Letters of a value that an error quotes: it may come to stand in the other's log."""


@dataclass(frozen=True)
class TrainRequest:
    """What the server asks of one client in one round.

    Attributes:
        run: the run's id.
        server_round: from 1; 0 asks the client to join a run with secret cohorts.
        config_hash: of the configuration that both sides hold.
        plan_hash: of the privacy plan; empty without privacy.
        backbone: fingerprint of the frozen model.
        state: the server's trainable state, a dense payload.
        ledger_length: what this client last acknowledged to this run; 0 for nothing.
        ledger_head: its newest hash then.
        durable_round: the server will not ask for this round or an earlier one again.
    """

    run: str
    server_round: int
    config_hash: str
    plan_hash: str
    backbone: str
    state: bytes
    ledger_length: int = 0
    ledger_head: str = ""
    durable_round: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        if not re.fullmatch("[0-9a-f]{16}", self.run):
            raise InvalidPayload(
                f"Expected a run id of 16 hex digits, got {_quoted(self.run)}."
            )
        numbers = (self.server_round, self.ledger_length, self.durable_round)
        if not 0 <= min(numbers) <= max(numbers) < _MOST:
            raise InvalidPayload("Expected rounds and lengths >= 0 and below 2**53.")
        _check_head(self.ledger_head)

    @property
    def hash(self) -> str:
        """sha256 of all that the answer depends on; not of the acknowledgements."""
        key = [
            self.run,
            self.server_round,
            self.config_hash,
            self.plan_hash,
            self.backbone,
            hashlib.sha256(self.state).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def to_record(self) -> RecordDict:
        """Returns the content of a Flower message."""
        return _pack(self.state, {k: v for k, v in vars(self).items() if k != "state"})

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrainRequest":
        """Reads :meth:`to_record`.

        Raises:
            InvalidPayload: for another content.
        """
        state, header = _unpack(record)
        try:
            return cls(state=state, **header)  # type: ignore[arg-type]
        except TypeError:
            raise InvalidPayload("Expected a train request's fields alone.") from None


@dataclass(frozen=True)
class TrainReply:
    """What a client answers.

    Attributes:
        code: ``ok`` or why not.
        payload: the compressed update's bytes; empty unless ``ok``.
        ledger_length: entries in the client's ledger after this answer.
        ledger_head: its newest hash.
        num_examples: -1 wherever privacy is claimed, since the number is private.
    """

    code: Code
    payload: bytes = b""
    ledger_length: int = 0
    ledger_head: str = ""
    num_examples: int = -1

    def __post_init__(self) -> None:
        _check_types(self)
        if self.code not in get_args(Code):
            raise InvalidPayload(f"Expected a reply code, got {_quoted(self.code)}.")
        if self.ledger_length < 0 or self.num_examples < -1 or not self.num_examples:
            raise InvalidPayload("Expected lengths >= 0 and examples >= 1 or none.")
        if max(self.ledger_length, self.num_examples) >= _MOST:
            raise InvalidPayload("Expected lengths and examples below 2**53.")
        _check_head(self.ledger_head)

    def to_record(self) -> RecordDict:
        """Returns the content of a Flower message."""
        header = {k: v for k, v in vars(self).items() if k != "payload"}
        return _pack(self.payload, header)

    @classmethod
    def from_record(cls, record: RecordDict) -> "TrainReply":
        """Reads :meth:`to_record`.

        Raises:
            InvalidPayload: for another content.
        """
        payload, header = _unpack(record)
        try:
            return cls(payload=payload, **header)  # type: ignore[arg-type]
        except TypeError:
            raise InvalidPayload("Expected a train reply's fields alone.") from None


def _check_types(message: object) -> None:
    """Raises InvalidPayload unless every field is of the type it declares."""
    for field in dataclasses.fields(message):  # type: ignore[arg-type]
        value = getattr(message, field.name)
        expected = field.type if isinstance(field.type, type) else str  # a Code
        if type(value) is not expected:
            raise InvalidPayload(f"Expected {field.name} as {expected.__name__}.")


def _check_head(head: str) -> None:
    if not re.fullmatch(_HEAD, head):
        raise InvalidPayload(f"Expected a ledger's newest hash, got {_quoted(head)}.")


def _quoted(value: str) -> str:
    return ascii(value[:_LONGEST])[:_LONGEST]


def _pack(data: bytes, header: dict[str, str | int]) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype=_BYTES, data=data)
    return RecordDict(
        {"data": ArrayRecord({"bytes": array}), "header": ConfigRecord({**header})}
    )


def _unpack(record: RecordDict) -> tuple[bytes, dict[str, object]]:
    data, header = record.get("data"), record.get("header")
    if not isinstance(data, ArrayRecord) or not isinstance(header, ConfigRecord):
        raise InvalidPayload("Expected a message with data and header.")
    array = data.get("bytes")
    if array is None or array.stype != _BYTES:
        raise InvalidPayload(f"Expected bytes of type {_BYTES}.")
    return array.data, dict(header)
