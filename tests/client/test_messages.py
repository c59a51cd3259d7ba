import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from client.messages import TrainReply, TrainRequest
from fedpeft.errors import InvalidPayload

REQUEST = TrainRequest(
    "0123456789abcdef", 3, "config", "plan", "backbone", b"state", 2, "head", 1
)


def test_messages_come_back_as_they_were() -> None:
    assert TrainRequest.from_record(REQUEST.to_record()) == REQUEST
    reply = TrainReply("ok", b"payload", 3, "head")
    assert TrainReply.from_record(reply.to_record()) == reply


def test_under_privacy_a_refusal_says_its_code_and_nothing_else() -> None:
    header = dict(TrainReply("budget-spent").to_record()["header"])
    assert header == {
        "code": "budget-spent",
        "ledger_length": 0,
        "ledger_head": "",
        "num_examples": -1,
    }


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"header": ConfigRecord({"code": "ok"})}),
        RecordDict({"data": ArrayRecord(), "header": ConfigRecord()}),
        RecordDict({"data": ConfigRecord({"bytes": 1}), "header": ConfigRecord()}),
        TrainReply("ok", b"x").to_record(),
    ],
)
def test_another_content_is_refused(record: RecordDict) -> None:
    with pytest.raises(InvalidPayload):
        TrainRequest.from_record(record)


def _altered(message: TrainRequest | TrainReply, **changes: object) -> RecordDict:
    """A record as a hostile peer would make it: any value in any field."""
    record = message.to_record()
    header = {**dict(record["header"]), **changes}
    return RecordDict({"data": record["data"], "header": ConfigRecord(header)})


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "../../../../elsewhere"},
        {"run": "*"},
        {"run": ""},
        {"run": 5},
        {"server_round": -1},
        {"server_round": -3},
        {"server_round": True},
        {"server_round": "1"},
        {"server_round": 1.5},
        {"ledger_length": -1},
        {"durable_round": "x"},
        {"durable_round": 2**53},
        {"server_round": 2**53},
        {"ledger_length": 2**53},
        {"ledger_head": "Head"},
        {"ledger_head": 65 * "0"},
        {"state": b"twice"},
        {"more": 1},
    ],
)
def test_a_hostile_request_is_refused(changes: dict) -> None:
    with pytest.raises((InvalidPayload, TypeError)):
        TrainRequest.from_record(_altered(REQUEST, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "a reason in prose"},
        {"code": 3},
        {"num_examples": "many"},
        {"num_examples": 0},
        {"num_examples": -5},
        {"ledger_length": "z"},
        {"ledger_length": 2**53},
        {"num_examples": 2**53},
        {"ledger_head": "a\nb"},
        {"ledger_head": "\x1b[2J"},
        {"ledger_head": 65 * "0"},
        {"code": 10_000 * "\x1b"},
        {10_000 * "x": 1},
        {"more": 1},
    ],
)
def test_a_hostile_reply_is_refused(changes: dict) -> None:
    with pytest.raises(InvalidPayload) as raised:
        TrainReply.from_record(_altered(TrainReply("ok", b"x"), **changes))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 120
