"""Requests that a client must not believe."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.answer import answer
from client.messages import TrainRequest
from client.site import Site, open_site
from fedpeft.compression import Dense
from fedpeft.model import trainable_state
from fedpeft.privacy import verify
from tests.helpers import small_config


@pytest.fixture(scope="module")
def site(small_reviews: Path) -> Site:
    open_site.cache_clear()
    return open_site(small_config(small_reviews).to_toml())


@pytest.fixture
def request_(site: Site) -> TrainRequest:
    state = Dense().compress(trainable_state(site.model), torch.Generator())
    return TrainRequest(
        run="0123456789abcdef",
        server_round=1,
        config_hash=site.config.hash,
        plan_hash=site.plan.hash,
        backbone=site.model.fingerprint,
        state=state.to_bytes(),
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"config_hash": "another"}, "config-mismatch"),
        ({"plan_hash": "a looser plan"}, "config-mismatch"),
        ({"plan_hash": ""}, "config-mismatch"),
        ({"backbone": "a malicious one"}, "backbone-mismatch"),
        ({"state": b"junk"}, "failed"),
        ({"ledger_length": 4, "ledger_head": "h"}, "ledger-refused"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_costs_nothing(
    site: Site, request_: TrainRequest, tmp_path: Path, change: dict, code: str
) -> None:
    reply = answer(site, 0, tmp_path, replace(request_, **change))
    assert (reply.code, reply.payload) == (code, b"")
    assert not (tmp_path / "ledger").exists()


def test_the_same_request_is_answered_with_the_same_bytes(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    first = answer(site, 0, tmp_path, request_)
    assert first.code == "ok"
    assert answer(site, 0, tmp_path, request_) == first
    assert len(verify(tmp_path, site.data_source(0)).entries) == 1


def test_the_same_round_with_another_state_is_refused(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    assert answer(site, 0, tmp_path, request_).code == "ok"
    state = {n: t + 1 for n, t in trainable_state(site.model).items()}
    other = Dense().compress(state, torch.Generator()).to_bytes()
    reply = answer(site, 0, tmp_path, replace(request_, state=other))
    assert reply.code == "request-conflict"


def test_the_number_of_examples_never_leaves_under_privacy(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    assert answer(site, 0, tmp_path, request_).num_examples == -1


def test_a_full_disk_is_a_refusal(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    state = tmp_path / "file"
    state.write_text("not a directory")
    assert answer(site, 0, state, request_).code == "failed"


def test_a_client_that_does_not_exist_has_no_data(site: Site) -> None:
    with pytest.raises(ValueError, match="Expected a client below 4"):
        site.data_source(-1)


def test_a_state_directory_of_other_records_is_refused(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "client-000-another.jsonl").touch()
    assert answer(site, 0, tmp_path, request_).code == "ledger-refused"
