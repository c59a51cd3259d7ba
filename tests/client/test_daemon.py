"""A client's process without a network: what it agrees to, what it answers."""

import logging
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message, RecordDict

from client.agreement import AcceptedPlans, Proposal
from client.app import deliver
from client.context import read_introduction
from client.daemon import Daemon, claimed
from client.enrolment import NotAccepted
from client.flower import set_identity, set_message_id
from client.messages import TrainReply, TrainRequest
from client.settings import (
    ClientSection,
    ClientSettings,
    LimitsSection,
    OwnDataSection,
)
from client.site import open_site
from fedpeft.compression import Dense
from fedpeft.errors import FedpeftError, RunError, RunStopped
from fedpeft.model import trainable_state
from fedpeft.privacy import data_sources, verify
from simulations.workers import handle
from tests.client.conftest import SmallDisk
from tests.helpers import small_config

RUN = "0123456789abcdef"


@pytest.fixture(scope="module")
def proposal(small_reviews: Path) -> Proposal:
    """A plan on real reviews, and the real backbone's fingerprint."""
    set_identity()
    toml = small_config(small_reviews).to_toml()
    open_site.cache_clear()
    return Proposal(RUN, toml, open_site(toml).model.fingerprint)


@pytest.fixture
def request_(proposal: Proposal) -> Message:
    site = open_site(proposal.toml)
    state = Dense().compress(trainable_state(site.model), torch.Generator())
    request = TrainRequest(
        run=RUN,
        server_round=1,
        config_hash=proposal.config.hash,
        plan_hash=proposal.plan.hash,
        backbone=proposal.backbone,
        state=state.to_bytes(),
    )
    message = Message(request.to_record(), dst_node_id=3, message_type="train")
    set_message_id(message, "m")
    return message


class Site:
    """A client's settings and what its operator is shown."""

    def __init__(self, state: Path, **limits: object) -> None:
        self.settings = ClientSettings(
            client=ClientSection(
                server="127.0.0.1:9", name="ward", state=state, insecure=True
            ),
            data=OwnDataSection(share=2),
            limits=LimitsSection(**{"seeded_noise": True, **limits}),
        )
        self.stop = threading.Event()
        self.shown: list[str] = []
        self.fetched: list[str] = []

    def daemon(self, accept: str | None = None) -> Daemon:
        return Daemon(
            self.settings,
            accept=accept,
            show=lambda rows, hash_: self.shown.append(hash_),
            fetch=self.fetched.extend,
            stop=self.stop,
        )


def test_a_plan_is_shown_and_nothing_is_done_until_it_is_accepted(
    proposal: Proposal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path)
    monkeypatch.setattr("client.daemon.open_site", None)
    with pytest.raises(NotAccepted, match=f"once with --accept {proposal.hash}"):
        site.daemon().agree(proposal, 2)
    assert (site.shown, site.fetched) == ([proposal.hash], [])
    assert not list(tmp_path.iterdir())


def test_a_plan_is_accepted_once_for_all(
    proposal: Proposal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path)
    with caplog.at_level(logging.INFO, "client"):
        site.daemon(accept=proposal.hash).agree(proposal, 2)
    assert f"plan in force hash={proposal.hash} epsilon=8.0000" in caplog.text
    assert site.shown == [proposal.hash]
    for accept in (None, proposal.hash):
        site.daemon(accept).agree(proposal, 2)
    assert site.shown == [proposal.hash]
    assert site.fetched == 3 * ["minilm"]
    assert AcceptedPlans(tmp_path).holds(proposal.hash)


def test_the_hash_of_another_plan_accepts_nothing(
    proposal: Proposal, tmp_path: Path
) -> None:
    site = Site(tmp_path)
    site.daemon(accept=proposal.hash).agree(proposal, 2)
    with pytest.raises(NotAccepted, match=r"the plan f{64} \(--accept\)"):
        site.daemon(accept="f" * 64).agree(proposal, 2)
    pinned = site.settings.client.model_copy(update={"accept": "e" * 64})
    site.settings = site.settings.model_copy(update={"client": pinned})
    with pytest.raises(NotAccepted, match=r"the plan e{64} \(\[client\] accept\)"):
        site.daemon().agree(proposal, 2)
    assert site.shown == 3 * [proposal.hash]


def test_a_plan_that_the_settings_pin_is_accepted(
    proposal: Proposal, tmp_path: Path
) -> None:
    site = Site(tmp_path)
    pinned = site.settings.client.model_copy(update={"accept": proposal.hash})
    site.settings = site.settings.model_copy(update={"client": pinned})
    site.daemon().agree(proposal, 2)
    assert AcceptedPlans(tmp_path).holds(proposal.hash)
    assert site.shown == [proposal.hash]


def test_an_accepted_plan_beyond_the_limits_is_refused_all_the_same(
    proposal: Proposal, tmp_path: Path
) -> None:
    daemon = Site(tmp_path, max_epsilon=1).daemon(accept=proposal.hash)
    with pytest.raises(RunError, match=r"\[limits\] max_epsilon"):
        daemon.agree(proposal, 2)


@pytest.mark.parametrize(
    ("change", "index", "message"),
    [
        ({"backbone": "f" * 64}, 2, "Expected the server's backbone minilm"),
        ({"toml": "[run"}, 2, "Expected a TOML file"),
        ({"toml": "rounds = 3"}, 2, "run: expected a value, got none"),
        ({}, 4, "Expected an index below 4, got 4"),
        ({}, -1, "Expected an index below 4, got -1"),
    ],
)
def test_a_proposal_that_does_not_fit_is_refused(
    proposal: Proposal, tmp_path: Path, change: dict, index: int, message: str
) -> None:
    other = replace(proposal, **change)
    accept = None if "toml" in change else other.hash
    with pytest.raises(FedpeftError, match=message):
        Site(tmp_path).daemon(accept=accept).agree(other, index)


def test_it_answers_what_the_simulated_client_answers_bit_for_bit(
    proposal: Proposal,
    request_: Message,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    daemon = Site(tmp_path / "own").daemon(accept=proposal.hash)
    daemon.agree(proposal, 2)
    with caplog.at_level(logging.INFO, "client"):
        own = TrainReply.from_record(daemon.handle(request_, 2).content)
    shared = {"config": proposal.toml, "state": str(tmp_path / "simulated")}
    simulated = TrainReply.from_record(handle(request_, shared, 2).content)
    assert own.code == "ok"
    assert own.payload == simulated.payload
    (record,) = (r for r in caplog.records if r.name == "client.daemon")
    assert record.getMessage().startswith("round=1 code=ok seconds=")
    assert (record.client, record.run, record.round) == ("ward", RUN, 1)


def test_a_full_disk_is_waited_out_and_never_reported(
    proposal: Proposal,
    request_: Message,
    small_disk: SmallDisk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = Site(small_disk.path / "state")
    daemon = site.daemon(accept=proposal.hash)
    daemon.agree(proposal, 2)
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 3:
            small_disk.free()
        return False

    monkeypatch.setattr(site.stop, "wait", wait)
    small_disk.fill()
    reply = TrainReply.from_record(daemon.handle(request_, 2).content)
    assert (reply.code, waits) == ("ok", [1.0, 2.0, 4.0])
    assert caplog.text.count("not answered: cannot store the answer") == 3
    assert caplog.text.count(" bytes free, found 0: ") == 3
    (source,) = data_sources(small_disk.path / "state")
    assert len(verify(small_disk.path / "state", source).entries) == 1


def test_who_waits_for_the_disk_can_be_stopped(
    proposal: Proposal, request_: Message, small_disk: SmallDisk
) -> None:
    site = Site(small_disk.path / "state")
    daemon = site.daemon(accept=proposal.hash)
    daemon.agree(proposal, 2)
    small_disk.fill()
    site.stop.set()
    with pytest.raises(RunStopped, match="before round 1 was answered"):
        daemon.handle(request_, 2)


def test_the_clients_own_budget_and_state_come_from_its_node(
    proposal: Proposal, request_: Message, tmp_path: Path
) -> None:
    def code(**node: str | float) -> str:
        run = {"config": proposal.toml, "state": str(tmp_path / "the-servers-choice")}
        given = {"partition-id": 2, "data": '{"share": 2}', **node}
        return TrainReply.from_record(deliver(request_, run, given).content).code

    state = str(tmp_path / "own")
    assert code(state=state, **{"budget-epsilon": 0.5}) == "budget-spent"
    assert code() == "failed"
    assert code(state=state, **{"budget-epsilon": 8}) == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_message_that_asks_for_no_round_does_not_end_the_client(
    proposal: Proposal,
    request_: Message,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    daemon = Site(tmp_path).daemon(accept=proposal.hash)
    daemon.agree(proposal, 2)
    error = Message(Error(code=1, reason="x"), reply_to=request_)
    query = Message(RecordDict(), dst_node_id=3, message_type="query")
    other = Message(RecordDict(), dst_node_id=3, message_type="evaluate")
    for message in (error, query, other):
        set_message_id(message, "m")
    with caplog.at_level(logging.INFO, "client"):
        reply = daemon.handle(error, 2)
        assert TrainReply.from_record(reply.content).code == "failed"
        assert daemon.handle(other, 2).has_error()
        assert read_introduction(daemon.handle(query, 2).content) == 2
    assert caplog.text.count("round=-1 code=failed") == 2
    assert "round=-1 code=ok" in caplog.text


def test_a_state_directory_serves_one_process(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with claimed(state):
        (state / "outbox").mkdir()
        rest = state / "outbox" / ".partial-of-a-killed-process"
        rest.touch()
        with pytest.raises(RunError, match="Another client is running in"):
            claimed(state).__enter__()
    with claimed(state):
        assert not rest.exists()
