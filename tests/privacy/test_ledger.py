"""Crashes, tampering and what an operator can do about it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from fedpeft.errors import LedgerError, PrivacyBudgetExceeded
from fedpeft.privacy import (
    Memory,
    Plan,
    Question,
    Release,
    RequestConflict,
    SecureRandomness,
    SeededRandomness,
    adopt,
    data_sources,
    epsilon,
    open_release,
    read_memory,
    verify,
)
from fedpeft.privacy.ledger import head_path, ledger_path
from fedpeft.privacy.outbox import Outbox
from fedpeft.tensors import zeros_like

SOURCE = "client-000"
UNITS = [[index] for index in range(8)]
PLAN = Plan(
    unit="example",
    relation="add-or-remove-one",
    target_epsilon=4.0,
    target_delta=1e-5,
    planned_epsilon=3.99,
    noise_multiplier=2.0,
    clipping_norm=1.0,
    sampling="poisson",
    sampling_rate=0.5,
    nominal_batch=4,
    local_steps=2,
    max_participations=4,
)


def _open(state: Path, plan: Plan | None = PLAN):
    return open_release(
        state,
        SOURCE,
        plan=plan,
        randomness=SeededRandomness(0),
        backbone="fingerprint",
    )


def _train(release: Release, plan: Plan | None = PLAN) -> None:
    """Draws what a round of local training draws."""
    for _ in release.draws.batches(UNITS) if plan else ():
        release.draws.noise(torch.zeros(3), plan.noise_multiplier * plan.clipping_norm)


def _release(state: Path, server_round: int, run: str = "run", plan=PLAN) -> bytes:
    with _open(state, plan) as release:
        question = Question(run, server_round, f"request-{server_round}")
        stored = release.repeat(question)
        if stored:
            return stored.payload
        release.authorise(question)
        _train(release, plan)
        payload = f"answer-{run}-{server_round}".encode()
        tensors = {"weight": torch.full((2,), float(server_round))}
        memory = Memory(residual=tensors, local=zeros_like(tensors))
        return release.commit(question, payload, memory).payload


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for server_round in (1, 2):
        _release(tmp_path, server_round)
    return tmp_path


def _lines(state: Path) -> list[bytes]:
    return ledger_path(state, SOURCE).read_bytes().splitlines(keepends=True)


def _rewrite(state: Path, lines: list[bytes]) -> None:
    ledger_path(state, SOURCE).write_bytes(b"".join(lines))


def test_releases_compose_over_runs(state: Path) -> None:
    _release(state, 1, run="another")
    ledger = verify(state, SOURCE)
    assert [entry.run for entry in ledger.entries] == ["run", "run", "another"]
    expected = epsilon([PLAN.composition(3)], 1e-5)
    assert ledger.spent(1e-5) == pytest.approx(expected)
    assert ledger.spent(1e-5) > epsilon([PLAN.composition(2)], 1e-5)


def test_the_same_request_gets_the_same_bytes_and_is_charged_once(state: Path) -> None:
    assert _release(state, 2) == b"answer-run-2"
    assert len(_lines(state)) == 2


def test_another_request_for_an_answered_round_is_refused(state: Path) -> None:
    with _open(state) as release, pytest.raises(RequestConflict, match="Round 2"):
        release.repeat(Question("run", 2, "something else"))


def test_a_clients_memory_is_the_newest_answers(state: Path) -> None:
    with _open(state) as release:
        memory = release.memory("run")
        assert release.memory("never seen") == Memory()
    # Residual and local part of one name do not meet.
    assert memory.residual["weight"].tolist() == [2.0, 2.0]
    assert memory.local["weight"].tolist() == [0.0, 0.0]
    assert read_memory(state, SOURCE, "run").residual["weight"].tolist() == [2.0, 2.0]


def test_a_record_from_before_there_were_local_parts_is_read(state: Path) -> None:
    path = state / "outbox" / SOURCE / "run-000000002.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        old = {n: file.get_tensor(n) for n in ("payload", "residual.weight")}
    path.write_bytes(save(old, metadata=metadata))
    memory = read_memory(state, SOURCE, "run")
    assert (memory.residual.keys(), memory.local) == ({"weight"}, {})
    assert _release(state, 2) == b"answer-run-2"


def test_acknowledged_answers_go_and_the_newest_stays(state: Path) -> None:
    with _open(state) as release:
        release.discard("run", 2)
    assert [record.entry.round for record in Outbox(state, SOURCE).records()] == [2]
    with _open(state) as release, pytest.raises(RequestConflict, match="not kept"):
        release.repeat(Question("run", 1, "request-1"))


def test_a_run_that_is_over_is_forgotten_but_not_what_it_spent(state: Path) -> None:
    _release(state, 1, run="other")
    with _open(state) as release:
        release.forget("run")
    records = Outbox(state, SOURCE).records()
    assert [record.entry.run for record in records] == ["other"]
    assert len(verify(state, SOURCE).entries) == 3


def test_an_answer_that_is_not_charged_yet_is_not_forgotten(state: Path) -> None:
    first, _ = verify(state, SOURCE).entries
    Outbox(state, SOURCE).forget("run", {first.hash})
    assert [record.entry.round for record in Outbox(state, SOURCE).records()] == [2]


def test_the_cap_of_the_plan_holds(tmp_path: Path) -> None:
    for server_round in range(1, 5):
        _release(tmp_path, server_round)
    with pytest.raises(PrivacyBudgetExceeded, match="4 rounds a client"):
        _release(tmp_path, 5)


def test_a_second_run_is_refused_where_the_budget_is_spent(tmp_path: Path) -> None:
    spent = 0
    while epsilon([PLAN.composition(spent + 1)], 1e-5) <= 4.0:
        spent += 1
        _release(tmp_path, 1, run=f"run-{spent}")
    with pytest.raises(PrivacyBudgetExceeded, match="exceed the budget of epsilon 4"):
        _release(tmp_path, 1, run="one more")
    ledger = verify(tmp_path, SOURCE)
    assert len(ledger.entries) == spent >= 4
    assert ledger.spent(1e-5) <= 4.0


def test_a_release_without_privacy_spends_everything(tmp_path: Path) -> None:
    _release(tmp_path, 1, plan=None)
    assert verify(tmp_path, SOURCE).spent(1e-5) == float("inf")
    with pytest.raises(PrivacyBudgetExceeded):
        _release(tmp_path, 2)


def test_training_outside_the_plan_is_not_released(tmp_path: Path) -> None:
    with _open(tmp_path) as release:
        for _ in release.draws.batches(UNITS):
            pass  # batches without noise
        with pytest.raises(ValueError, match="2 batches and 2 noises"):
            release.commit(Question("run", 1, "r"), b"bytes", Memory())
        with pytest.raises(ValueError, match=r"Expected noise of 2\.0, got 1\.0"):
            release.draws.noise(torch.zeros(3), 1.0)
    assert not ledger_path(tmp_path, SOURCE).exists()


@pytest.mark.parametrize("cut", [1, 50, -1])
def test_a_torn_last_line_is_repaired_and_charged(state: Path, cut: int) -> None:
    _release(state, 3)
    lines = _lines(state)
    head_path(state, SOURCE).write_text(
        json.dumps({"length": 2, "hash": json.loads(lines[1])["hash"]})
    )
    _rewrite(state, [*lines[:2], lines[2][:cut]])
    assert _release(state, 3) == b"answer-run-3"
    assert _lines(state) == lines


def test_an_answer_that_a_crash_kept_from_the_ledger_is_charged(state: Path) -> None:
    before = {
        path: path.read_bytes()
        for path in (ledger_path(state, SOURCE), head_path(state, SOURCE))
    }
    _release(state, 3)
    for path, content in before.items():  # as if killed right after the outbox
        path.write_bytes(content)
    assert _release(state, 3) == b"answer-run-3"
    assert len(_lines(state)) == 3


def test_a_head_that_lags_behind_is_brought_up(state: Path) -> None:
    head = head_path(state, SOURCE).read_bytes()
    _release(state, 3)
    newest = head_path(state, SOURCE).read_bytes()
    head_path(state, SOURCE).write_bytes(head)
    _release(state, 3)
    assert head_path(state, SOURCE).read_bytes() == newest


def _deleted(state: Path) -> None:
    ledger_path(state, SOURCE).unlink()


def _deleted_with_head(state: Path) -> None:
    ledger_path(state, SOURCE).unlink()
    head_path(state, SOURCE).unlink()


def _head_deleted(state: Path) -> None:
    head_path(state, SOURCE).unlink()


def _shortened(state: Path) -> None:
    _rewrite(state, _lines(state)[:1])


def _edited(state: Path) -> None:
    lines = _lines(state)
    _rewrite(state, [lines[0].replace(b'"steps": 2', b'"steps": 1'), lines[1]])


def _last_edited(state: Path) -> None:
    lines = _lines(state)
    _rewrite(state, [lines[0], lines[1].replace(b"2.0", b"9.0")])


def _line_removed(state: Path) -> None:
    _rewrite(state, _lines(state)[1:])


def _garbage(state: Path) -> None:
    ledger_path(state, SOURCE).write_bytes(b"\x00\xff\n" * 2)


def _head_garbage(state: Path) -> None:
    head_path(state, SOURCE).write_bytes(b"[]")


def _outbox_damaged(state: Path) -> None:
    path = next((state / "outbox" / SOURCE).iterdir())
    path.write_bytes(path.read_bytes()[:-9])


TAMPERINGS = [
    _deleted,
    _deleted_with_head,
    _head_deleted,
    _shortened,
    _edited,
    _last_edited,
    _line_removed,
    _garbage,
    _head_garbage,
    _outbox_damaged,
]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda f: f.__name__)
def test_tampering_is_noticed_and_an_operator_can_go_on(state: Path, tamper) -> None:
    honest = verify(state, SOURCE).spent(1e-5)
    tamper(state)
    with pytest.raises(LedgerError) as caught:
        _release(state, 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(LedgerError):
        verify(state, SOURCE)
    adopt(state, SOURCE)
    assert verify(state, SOURCE).spent(1e-5) >= honest or tamper is _head_deleted


def test_a_restored_backup_is_noticed(state: Path, tmp_path_factory) -> None:
    backup = tmp_path_factory.mktemp("backup")
    for folder in ("ledger", "heads"):
        shutil.copytree(state / folder, backup / folder)
    _release(state, 3)
    for folder in ("ledger", "heads"):
        shutil.rmtree(state / folder)
        shutil.copytree(backup / folder, state / folder)
    with _open(state) as release:  # the outbox still knows the third release
        pass
    assert len(_lines(state)) == 3
    for folder in ("ledger", "heads", "outbox"):
        shutil.rmtree(state / folder)
    shutil.copytree(backup, state, dirs_exist_ok=True)
    with (
        _open(state) as release,
        pytest.raises(LedgerError, match="lost or restored"),
    ):
        release.confirm(3, "what the server was told")


def test_adopting_charges_lost_releases_at_the_costliest_price(state: Path) -> None:
    _release(state, 3)
    _rewrite(state, _lines(state)[:1])
    adoption = adopt(state, SOURCE)
    assert (adoption.kept, adoption.charged) == (1, 2)
    assert adoption.backup is not None
    assert verify(state, SOURCE).spent(1e-5) == pytest.approx(
        epsilon([PLAN.composition(3)], 1e-5)
    )


def test_adopting_without_any_knowledge_is_infinitely_dear(state: Path) -> None:
    _deleted(state)
    shutil.rmtree(state / "outbox")
    assert adopt(state, SOURCE).charged == 2
    assert verify(state, SOURCE).spent(1e-5) == float("inf")
    with pytest.raises(PrivacyBudgetExceeded):
        _release(state, 3)


def test_a_full_disk_releases_nothing(state: Path, monkeypatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("fedpeft.privacy.outbox.write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        _release(state, 3)
    assert len(_lines(state)) == 2


def test_adopting_prices_lost_entries_by_what_stands_behind_the_damage(
    state: Path,
) -> None:
    dear = dataclasses.replace(PLAN, noise_multiplier=0.5, target_epsilon=100.0)
    _release(state, 3, "another", plan=dear)
    honest = verify(state, SOURCE).spent(1e-5)
    lines = _lines(state)
    _rewrite(
        state, [lines[0], lines[1].replace(b'"steps": 2', b'"steps": 1'), lines[2]]
    )
    adopt(state, SOURCE)
    assert verify(state, SOURCE).spent(1e-5) >= honest


def test_adopting_never_forgets_a_release_without_privacy(state: Path) -> None:
    _release(state, 3, plan=None)
    assert verify(state, SOURCE).spent(1e-5) == float("inf")
    _rewrite(state, _lines(state)[:2])
    adopt(state, SOURCE)
    assert verify(state, SOURCE).spent(1e-5) == float("inf")


@pytest.mark.parametrize("step", ["head", "outbox"])
def test_a_crash_in_the_middle_of_adopting_forgets_nothing(
    state: Path, monkeypatch, step: str
) -> None:
    _release(state, 3)
    honest = verify(state, SOURCE).spent(1e-5)
    _rewrite(state, _lines(state)[:1])

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    places = {
        "head": "fedpeft.privacy.ledger.Ledger.write_head",
        "outbox": "fedpeft.privacy.outbox.Outbox.keep_only",
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[step], crash)
        with pytest.raises(KeyboardInterrupt):
            adopt(state, SOURCE)
    adopt(state, SOURCE)
    assert verify(state, SOURCE).spent(1e-5) >= honest


def test_verifying_changes_nothing_that_is_damaged(state: Path) -> None:
    path = ledger_path(state, SOURCE)
    path.write_bytes(path.read_bytes()[:-40])
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="shortened"):
        verify(state, SOURCE)
    assert path.read_bytes() == before


def test_a_last_line_that_lacks_its_end_is_kept(state: Path) -> None:
    path = ledger_path(state, SOURCE)
    path.write_bytes(path.read_bytes()[:-1])
    assert len(verify(state, SOURCE).entries) == 2
    assert _release(state, 2) == b"answer-run-2"


def test_secure_noise_is_refused_after_seeded_noise(state: Path) -> None:
    with (
        open_release(
            state,
            SOURCE,
            plan=PLAN,
            randomness=SecureRandomness(),
            backbone="fingerprint",
        ) as release,
        pytest.raises(PrivacyBudgetExceeded, match="seeded"),
    ):
        release.authorise(Question("another", 1, "r"))


def test_a_round_that_fails_after_drawing_is_charged_once(state: Path) -> None:
    question = Question("run", 3, "request-3")
    with _open(state) as release:
        release.authorise(question)
        next(iter(release.draws.batches(UNITS)))
        release.forfeit(question)
    assert len(_lines(state)) == 3
    with _open(state) as release:
        assert release.repeat(question).payload == b""
        assert release.memory("run").residual["weight"].tolist() == [2.0, 2.0]


def test_dropout_masks_of_a_private_step_are_not_the_servers_to_know(
    tmp_path: Path,
) -> None:
    seeds = set()
    for _ in range(3):
        with open_release(
            tmp_path,
            SOURCE,
            plan=PLAN,
            randomness=SecureRandomness(),
            backbone="fingerprint",
        ) as release:
            seeds.add(release.draws.mask_seed())
    assert len(seeds) == 3


def test_adopting_remembers_that_noise_was_seeded(state: Path) -> None:
    _deleted_with_head(state)
    adopt(state, SOURCE)
    mechanisms = {entry.mechanism for entry in verify(state, SOURCE).entries}
    assert mechanisms == {"gaussian-seeded"}


def test_adopting_counts_what_only_the_outbox_knows(state: Path) -> None:
    for server_round in (3, 4):
        _release(state, server_round)
    with _open(state) as release:
        release.discard("run", 3)
    lines = _lines(state)
    damaged = lines[2].replace(b'"steps": 2', b'"steps": 1')
    _rewrite(state, [*lines[:2], damaged])  # the fourth is in the outbox alone
    assert adopt(state, SOURCE).charged >= 2


def test_a_stored_answer_that_was_swapped_is_not_sent(state: Path) -> None:
    folder = state / "outbox" / SOURCE
    first, second = sorted(folder.iterdir())
    shutil.copy(first, second)
    with (
        _open(state) as release,
        pytest.raises(LedgerError, match="not the one that was charged"),
    ):
        release.repeat(Question("run", 2, "request-2"))


def test_data_sources_are_found_by_any_trace(state: Path) -> None:
    _deleted_with_head(state)
    assert data_sources(state) == [SOURCE]


def test_batches_are_drawn_at_the_planned_rate(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, local_steps=500)
    with _open(tmp_path, plan) as release:
        drawn = sum(len(batch) for batch in release.draws.batches(UNITS))
    # 4,000 decisions at 1/2: a standard deviation of 32.
    assert drawn == pytest.approx(2000, abs=160)


def test_a_person_with_many_examples_is_drawn_with_at_most_so_many(
    tmp_path: Path,
) -> None:
    plan = dataclasses.replace(PLAN, sampling_rate=1.0, local_steps=50, max_examples=2)
    persons = [[0, 1, 2, 3], [4], [5, 6]]
    with _open(tmp_path, plan) as release:
        batches = list(release.draws.batches(persons))
    assert all(batch[1:] == [[4], [5, 6]] for batch in batches)
    drawn = [tuple(batch[0]) for batch in batches]
    assert all(len(pair) == 2 and pair == tuple(sorted(pair)) for pair in drawn)
    assert {index for pair in drawn for index in pair} == {0, 1, 2, 3}


def test_the_acknowledged_head_does_not_tell_which_data_it_speaks_of(
    tmp_path: Path,
) -> None:
    heads = set()
    for number in range(3):
        _release(tmp_path / str(number), 1)
        entry = verify(tmp_path / str(number), SOURCE).entries[0]
        heads.add(entry.hash)
        assert len(entry.nonce) == 32
    assert len(heads) == 3  # though every other field is the same


def test_entries_written_before_there_was_a_nonce_still_verify(tmp_path: Path) -> None:
    _release(tmp_path, 1)
    entry = verify(tmp_path, SOURCE).entries[0]
    old = dataclasses.replace(entry, nonce="").sealed("0" * 64)
    assert "nonce" not in json.loads(old.to_json())
    assert type(old).from_json(old.to_json()) == old


def test_a_ledger_of_format_1_is_read_and_goes_on(tmp_path: Path) -> None:
    """The file was written by the version that knew no other."""
    path = ledger_path(tmp_path, "ward-7")
    path.parent.mkdir()
    lines = (Path(__file__).parent / "data" / "ledger-format-1.jsonl").read_bytes()
    path.write_bytes(lines)
    head = {"length": 2, "hash": json.loads(lines.splitlines()[1])["hash"]}
    head_path(tmp_path, "ward-7").parent.mkdir()
    head_path(tmp_path, "ward-7").write_text(json.dumps(head))
    assert [entry.round for entry in verify(tmp_path, "ward-7").entries] == [1, 2]
    assert path.read_bytes() == lines


@pytest.mark.parametrize("do", [verify, adopt])
def test_a_ledger_of_a_newer_version_is_left_as_it_is(state: Path, do) -> None:
    lines = _lines(state)
    newest = json.loads(lines[-1])
    newest["format"] += 1
    _rewrite(state, [*lines[:-1], json.dumps(newest).encode()])
    before = ledger_path(state, SOURCE).read_bytes()
    with pytest.raises(LedgerError, match="newer fedpeft, in format 2"):
        do(state, SOURCE)
    assert ledger_path(state, SOURCE).read_bytes() == before


def test_adopting_a_restored_backup_charges_what_a_server_had_heard_of(
    state: Path, tmp_path_factory
) -> None:
    backup = tmp_path_factory.mktemp("backup") / "state"
    shutil.copytree(state, backup)
    before = len(verify(state, SOURCE).entries)
    _release(state, 9)
    acknowledged = verify(state, SOURCE)
    with (
        _open(backup) as release,
        pytest.raises(LedgerError, match=f"--acknowledged {before + 1} it charges"),
    ):
        release.confirm(before + 1, acknowledged.head)
    assert adopt(backup, SOURCE).charged == 0  # by itself it shows no damage
    assert adopt(backup, SOURCE, acknowledged=before + 1).charged == 1
    assert verify(backup, SOURCE).spent(1e-5) >= acknowledged.spent(1e-5)
