"""A client of canaries, asked twice: what the protocol promises is looked at."""

from pathlib import Path

import pytest

import client.answer
from client.messages import TrainReply
from fedpeft.peft import Lora
from simulations.canaries import protocol_checks
from tests.helpers import small_config, toy
from tests.test_training import _task

UNITS = {
    "example": (),
    "person": ("privacy.unit=person", "data.person=film", "data.nominal_persons=48"),
    "client": ("privacy.unit=client", "cohort.sampling=poisson"),
}


def _failed(unit: str) -> dict[str, bool]:
    config = small_config(Path("reviews.csv"), *UNITS[unit])
    checks = protocol_checks(config, _task(toy(Lora(rank=2))))
    assert len(checks) == (9 if unit == "client" else 6)
    assert {check.status for check in checks} <= {"ok", "failed"}
    return {check.check: check.falsifies for check in checks if check.status != "ok"}


@pytest.mark.parametrize("unit", UNITS)
def test_the_protocol_keeps_its_promises(unit: str) -> None:
    assert _failed(unit) == {}


def test_without_a_claim_there_is_nothing_to_check() -> None:
    config = small_config(Path("reviews.csv"), "privacy.unit=none")
    assert protocol_checks(config, _task(toy(Lora(rank=2)))) == []


def test_a_number_of_examples_that_travels_refutes_the_claim(monkeypatch) -> None:
    def tell(*arguments: object, **options: object) -> TrainReply:
        return TrainReply(*arguments, **{**options, "num_examples": 8})

    monkeypatch.setattr(client.answer, "TrainReply", tell)
    assert _failed("example") == {
        "reply: the number of examples stays at the client": True
    }


def test_a_second_answer_that_is_charged_is_a_failure_and_refutes_nothing(
    monkeypatch,
) -> None:
    monkeypatch.setattr(client.answer.Release, "repeat", lambda release, question: None)
    assert _failed("example") == {
        "reply: one request has one answer, whenever it is asked": False
    }


def test_a_client_that_compares_no_plan_is_a_failure(monkeypatch) -> None:
    monkeypatch.setattr(client.answer, "_mismatch", lambda site, request: None)
    assert _failed("example") == {
        "reply: a request under another plan is refused": False
    }
