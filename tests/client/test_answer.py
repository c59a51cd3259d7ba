"""Requests that a client must not believe."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import client.answer
import client.update
from client.answer import answer
from client.messages import TrainRequest
from client.site import Site, open_site
from fedpeft.compression import Dense
from fedpeft.model import local_state, shared_state, trainable_state
from fedpeft.privacy import Memory, Release, read_memory, verify
from fedpeft.privacy.draws import Draws
from fedpeft.privacy.outbox import Outbox
from fedpeft.tensors import Tensors, flatten
from tests.client.conftest import SmallDisk
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


def test_a_request_of_another_run_than_was_proposed_is_refused(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    run = site.config.run.model_copy(update={"id": "f" * 16})
    proposed = replace(site, config=site.config.model_copy(update={"run": run}))
    assert answer(proposed, 0, tmp_path, request_).code == "config-mismatch"
    assert not (tmp_path / "ledger").exists()
    request = replace(request_, run="f" * 16)
    assert answer(proposed, 0, tmp_path, request).code == "ok"


def test_the_same_request_is_answered_with_the_same_bytes(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    first = answer(site, 0, tmp_path, request_)
    assert first.code == "ok"
    assert answer(site, 0, tmp_path, request_) == first
    assert len(verify(tmp_path, site.holding(0).source).entries) == 1


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


def test_a_state_that_cannot_be_written_is_a_refusal_that_names_it(
    site: Site,
    request_: TrainRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = tmp_path / "file"
    state.write_text("not a directory")
    assert answer(site, 0, state, request_).code == "storage-failed"
    assert f"refused=storage-failed: Not a directory: {state}" in caplog.text


def _fill_after(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    """Fills the disk whenever a function has done its work."""
    work: Callable = getattr(place, name)

    def then_full(*args: object, **options: object) -> object:
        result = work(*args, **options)
        disk.fill()
        return result

    monkeypatch.setattr(place, name, then_full)


MOMENTS: dict[str, tuple[object, str]] = {
    "before": (Release, "authorise"),
    "at the outbox": (client.update, "train_locally"),
    "at the ledger": (Outbox, "put"),
}


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_releases_nothing_and_with_room_again_everything_once(
    site: Site,
    request_: TrainRequest,
    small_disk: SmallDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    rounds: int,
) -> None:
    state, elsewhere = small_disk.path / "state", tmp_path / "elsewhere"
    asked = request_
    for server_round in range(1, rounds):
        known = answer(site, 0, state, asked)
        answer(site, 0, elsewhere, asked)
        asked = replace(
            asked,
            server_round=server_round + 1,
            ledger_length=known.ledger_length,
            ledger_head=known.ledger_head,
        )
    with monkeypatch.context() as patch:
        _fill_after(small_disk, patch, *MOMENTS[moment])
        for _ in range(2):
            reply = answer(site, 0, state, asked)
            assert (reply.code, reply.payload) == ("storage-failed", b"")
    assert not list(state.rglob(".partial-*"))
    small_disk.free()
    reply = answer(site, 0, state, asked)
    assert reply.code == "ok"
    whole = answer(site, 0, elsewhere, replace(asked, ledger_length=0))
    assert reply.payload == whole.payload
    entries = verify(state, site.holding(0).source).entries
    assert [entry.round for entry in entries] == list(range(1, rounds + 1))
    assert answer(site, 0, state, asked) == reply


def test_a_disk_without_room_is_noticed_before_any_data_are_read(
    site: Site,
    request_: TrainRequest,
    small_disk: SmallDisk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client.update, "train_locally", None)
    (small_disk.path / "other").write_bytes(bytes(3 << 20))  # 1 MB is left of 4
    assert answer(site, 0, small_disk.path, request_).code == "storage-failed"


def test_a_restored_backup_is_refused_and_explained(
    site: Site,
    request_: TrainRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = answer(site, 0, tmp_path / "lost", request_)
    later = replace(
        request_,
        server_round=2,
        ledger_length=known.ledger_length,
        ledger_head=known.ledger_head,
    )
    reply = answer(site, 0, tmp_path / "restored", later)
    assert (reply.code, reply.payload) == ("ledger-refused", b"")
    assert "Was this state directory restored from a backup" in caplog.text
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert (record.run, record.round) == (request_.run, 2)


def test_the_clients_own_budget_is_never_exceeded(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    reply = answer(site, 0, tmp_path, request_, budget_epsilon=0.5)
    assert reply.code == "budget-spent"
    assert not (tmp_path / "ledger").exists()


def test_a_client_that_does_not_exist_has_no_data(site: Site) -> None:
    with pytest.raises(ValueError, match="Expected a client below 4"):
        site.holding(-1)


def test_a_state_directory_of_other_records_is_refused(
    site: Site, request_: TrainRequest, tmp_path: Path
) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "client-000-another.jsonl").touch()
    assert answer(site, 0, tmp_path, request_).code == "ledger-refused"


@pytest.fixture(scope="module")
def personal(small_reviews: Path) -> Site:
    """A site whose clients keep LoRA's B."""
    open_site.cache_clear()
    share = 'peft.share=["lora_A", "head"]'
    return open_site(small_config(small_reviews, share).to_toml())


def _asked(site: Site, server_round: int = 1, run: str = "0" * 16) -> TrainRequest:
    """The initial state again, whatever a site has trained since."""
    zeros = {name: torch.zeros_like(t) for name, t in shared_state(site.model).items()}
    return TrainRequest(
        run=run,
        server_round=server_round,
        config_hash=site.config.hash,
        plan_hash=site.plan.hash,
        backbone=site.model.fingerprint,
        state=Dense().compress(zeros, torch.Generator()).to_bytes(),
    )


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Tensors]:
    """The states from which clients have trained."""
    seen: list[Tensors] = []
    train = client.update.train_locally

    def noted(model, state, *arguments, **options):
        seen.append(state)
        return train(model, state, *arguments, **options)

    monkeypatch.setattr(client.update, "train_locally", noted)
    return seen


def _local(site: Site, state: Tensors) -> torch.Tensor:
    return flatten({name: state[name] for name in site.model.local_start})


def test_a_client_goes_on_from_what_it_kept_and_trains_once_for_a_request(
    personal: Site, starts: list[Tensors], tmp_path: Path
) -> None:
    def kept() -> torch.Tensor:
        source = personal.holding(0).source
        return flatten(read_memory(tmp_path, source, "0" * 16).local)

    first = answer(personal, 0, tmp_path, _asked(personal))
    assert first.code == "ok"
    after_first = kept()
    answer(personal, 1, tmp_path, _asked(personal))  # leaves its own in the model
    assert answer(personal, 0, tmp_path, _asked(personal)) == first
    assert torch.equal(kept(), after_first)
    assert answer(personal, 0, tmp_path, _asked(personal, 2)).code == "ok"
    initial = flatten(personal.model.local_start)
    expected = [initial, initial, after_first]
    assert len(starts) == 3
    for start, local in zip(starts, expected, strict=True):
        assert torch.equal(_local(personal, start), local)
    assert torch.equal(kept(), flatten(local_state(personal.model)))
    assert not torch.equal(kept(), after_first)


def test_another_run_starts_from_the_initial_local_part(
    personal: Site, starts: list[Tensors], tmp_path: Path
) -> None:
    site = replace(personal, plan=replace(personal.plan, target_epsilon=1e9))
    for run in ("a" * 16, "b" * 16):
        request = replace(_asked(site, run=run), plan_hash=site.plan.hash)
        assert answer(site, 0, tmp_path, request).code == "ok"
    for start in starts:
        assert torch.equal(_local(site, start), flatten(site.model.local_start))


def test_a_round_that_fails_leaves_the_local_part_of_the_one_before(
    personal: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory() -> Memory:
        return read_memory(tmp_path, personal.holding(0).source, "0" * 16)

    answer(personal, 0, tmp_path, _asked(personal))
    before = memory()
    broken = {name: t * torch.inf for name, t in before.local.items()}
    with monkeypatch.context() as patch:
        patch.setattr(client.update, "local_state", lambda model: broken)
        with pytest.raises(ValueError, match="Expected finite tensors to keep"):
            answer(personal, 0, tmp_path, _asked(personal, 2))
    assert answer(personal, 0, tmp_path, _asked(personal, 2)).code == "failed"
    assert torch.equal(flatten(memory().local), flatten(before.local))


def test_what_stays_is_noised_in_one_vector_with_what_travels(
    personal: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    draw = Draws.noise

    def noted(self, total: torch.Tensor, deviation: float) -> torch.Tensor:
        sizes.append(total.numel())
        return draw(self, total, deviation)

    monkeypatch.setattr(Draws, "noise", noted)
    assert answer(personal, 0, tmp_path, _asked(personal)).code == "ok"
    everything = flatten(trainable_state(personal.model)).numel()
    assert sizes == [everything] * personal.plan.local_steps


def test_a_state_that_holds_what_stays_is_refused(
    personal: Site, tmp_path: Path
) -> None:
    whole = Dense().compress(trainable_state(personal.model), torch.Generator())
    request = replace(_asked(personal), state=whole.to_bytes())
    assert answer(personal, 0, tmp_path, request).code == "failed"
    assert not (tmp_path / "ledger").exists()
