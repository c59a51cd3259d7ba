"""A state that was crafted is refused before anything is trained or charged."""

from pathlib import Path

import pytest
import torch

from client.answer import answer
from client.messages import TrainRequest
from client.site import Site, open_site
from client.suspicion import exposure, suspicion
from fedpeft.compression import Dense
from fedpeft.tensors import Tensors
from tests.helpers import small_config


@pytest.fixture(scope="module")
def site(small_reviews: Path) -> Site:
    open_site.cache_clear()
    peft = "peft={name='bottleneck', width=4}"
    return open_site(small_config(small_reviews, peft).to_toml())


def _request(site: Site, state: Tensors, server_round: int = 1) -> TrainRequest:
    return TrainRequest(
        run="0123456789abcdef",
        server_round=server_round,
        config_hash=site.config.hash,
        plan_hash=site.plan.hash,
        backbone=site.model.fingerprint,
        state=Dense().compress(state, torch.Generator()).to_bytes(),
    )


def test_rows_of_one_direction_are_refused_and_cost_nothing(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = next(name for name in site.start if name.endswith("down.weight"))
    bins = site.start[name][:1] * torch.arange(1, 5)[:, None]
    reply = answer(site, 0, tmp_path, _request(site, {**site.start, name: bins}))
    assert (reply.code, reply.payload) == ("state-refused", b"")
    assert not (tmp_path / "ledger").exists()
    assert "100% of the pairs of rows are one direction" in caplog.text


def test_an_honest_state_is_not_suspected(site: Site, tmp_path: Path) -> None:
    assert suspicion(site, _request(site, site.start)) is None
    assert answer(site, 0, tmp_path, _request(site, site.start)).code == "ok"


def test_a_head_that_saw_one_class_is_not_suspected(site: Site) -> None:
    alike = {n: torch.ones_like(t) for n, t in site.start.items() if "head" in n}
    assert suspicion(site, _request(site, {**site.start, **alike}, 2)) is None


def test_the_refusal_depends_on_no_record(site: Site) -> None:
    name = next(name for name in site.start if name.endswith("down.weight"))
    request = _request(site, {**site.start, name: torch.ones_like(site.start[name])})
    empty = Site(**{**vars(site), "holdings": ()})
    assert suspicion(empty, request) == suspicion(site, request)


def test_what_arithmetic_exposes_is_said_before_joining(site: Site) -> None:
    assert exposure(site).startswith(
        "infeasible without noise, which this plan adds: 768"
    )
