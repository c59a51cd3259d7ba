"""What is kept of a run is read as far as the run can have had it."""

from pathlib import Path

import pytest
import torch

from fedpeft.audit.observing import seen_by_client
from fedpeft.audit.recording import Answer, Records
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig
from fedpeft.errors import DataError
from fedpeft.model import TaskModel, build_model, shared_state
from tests.audit.test_evidence import SCENARIO


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return RunConfig.from_toml(SCENARIO)


@pytest.fixture(scope="module")
def model(config: RunConfig, minilm: Path) -> TaskModel:
    return build_model(config, 2)


@pytest.fixture(scope="module")
def payload(model: TaskModel) -> bytes:
    state = shared_state(model)
    return COMPRESSORS["dense"]().compress(state, torch.Generator()).to_bytes()


def test_answers_of_no_client_and_no_round_spoil_no_audit(
    config: RunConfig, model: TaskModel, payload: bytes
) -> None:
    places = [(1, 0), (1, 999), (2, 2), (3, 1)]
    answers = tuple(Answer(n, client, {}, payload) for n, client in places)
    records = Records({1: payload, 2: payload, 7: b"junk"}, answers)
    seen = seen_by_client(records, config, model)
    assert {client: len(parts) for client, parts in seen.items()} == {0: 1, 2: 1}


def test_what_the_server_refused_is_not_seen_and_forged_numbers_are_none(
    config: RunConfig, model: TaskModel, payload: bytes
) -> None:
    headers: list[dict[str, str | int]] = [
        {"code": "ok", "num_examples": 7},
        {"code": "budget-exhausted", "num_examples": 7},
        {"code": "ok", "num_examples": "many"},
    ]
    answers = tuple(Answer(1, n, header, payload) for n, header in enumerate(headers))
    seen = seen_by_client(Records({1: payload}, answers), config, model)
    numbers = {client: part.num_examples for client, (part,) in seen.items()}
    assert numbers == {0: 7, 2: None}


def test_answers_without_the_state_of_their_round_are_refused(
    config: RunConfig, model: TaskModel, payload: bytes
) -> None:
    records = Records({1: payload}, (Answer(2, 0, {}, payload),))
    with pytest.raises(DataError, match="incomplete"):
        seen_by_client(records, config, model)
