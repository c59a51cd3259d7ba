from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from client.context import (
    configuration,
    introduction,
    read_introduction,
    run_directory,
    state_directory,
)
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, InvalidPayload
from fedpeft.scenarios import find_scenario

FLOWER = {"scenario": "text_reviews", "set": "run.rounds=2 peft={name='head'}"}


def _context(node: dict | None = None, **run: str) -> Context:
    settings = {**FLOWER, "output": "", **run}
    return Context(255, 7, node or {}, RecordDict(), settings)


def test_a_scenario_and_its_overrides_give_the_configuration_of_the_command_line() -> (
    None
):
    overrides = ["run.rounds=2", "peft={name='head'}"]
    config = RunConfig.from_file(find_scenario("text_reviews"), overrides)
    assert configuration(_context()) == config.to_toml()


def test_a_configuration_of_our_own_runtimes_stands_above_a_scenario() -> None:
    assert configuration(_context(config="whole")) == "whole"


def test_an_unknown_scenario_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="chat_small, images, text_reviews"):
        configuration(_context(scenario="text_revews"))


def test_a_run_is_found_by_flowers_number_of_it() -> None:
    assert run_directory(_context()) == Path("runs/flwr-00000000000000ff")
    assert run_directory(_context(output="/runs/mine")) == Path("/runs/mine")


@pytest.mark.parametrize(
    ("node", "run", "expected"),
    [
        ({"state": "/own"}, {"state": "/servers"}, "/own"),
        ({"state": "/own", "data": "{}"}, {}, "/own"),
        ({}, {"state": "/servers"}, "/servers"),
        ({}, {"set": "run.state=/scenarios"}, "/scenarios"),
        ({}, {}, "runs/flwr-00000000000000ff"),
    ],
)
def test_a_ledger_lies_with_the_node_before_all_else(
    node: dict, run: dict, expected: str
) -> None:
    assert state_directory(_context(node, **run)) == Path(expected)


def test_records_of_ones_own_need_a_state_of_ones_own() -> None:
    with pytest.raises(ConfigError, match="state beside data"):
        state_directory(_context({"data": "{}"}, state="/servers"))


def test_a_client_says_which_one_it_is() -> None:
    assert read_introduction(introduction(_context({"partition-id": 3}))) == 3


@pytest.mark.parametrize("index", ["3", 3.0, True, [3]])
def test_only_a_whole_number_is_an_index(index: object) -> None:
    record = RecordDict({"client": ConfigRecord({"index": index})})
    with pytest.raises(InvalidPayload):
        read_introduction(record)


def test_a_record_of_something_else_is_no_introduction() -> None:
    with pytest.raises(InvalidPayload):
        read_introduction(RecordDict())
