import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from client.messages import TrainReply, TrainRequest
from fedpeft.errors import InvalidPayload

REQUEST = TrainRequest("run", 3, "config", "plan", "backbone", b"state", 2, "head", 1)


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
        TrainReply("ok", b"x").to_record(),
    ],
)
def test_another_content_is_refused(record: RecordDict) -> None:
    with pytest.raises(InvalidPayload):
        TrainRequest.from_record(record)


def test_an_unknown_code_is_refused() -> None:
    record = TrainReply("a reason in prose").to_record()
    with pytest.raises(InvalidPayload, match="Expected a reply code"):
        TrainReply.from_record(record)
