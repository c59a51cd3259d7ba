"""What a run's files must say, and which disagreement refutes the claim."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedpeft.audit import evidence, ledgers, weakening
from fedpeft.audit.evidence import check_records, read_released, read_run
from fedpeft.audit.results import Check
from fedpeft.config import RunConfig
from fedpeft.errors import RunError
from fedpeft.privacy import ENROLMENT, SEEDED, Ledger, Plan, epsilon, make_plan
from fedpeft.privacy.ledger import Entry

RUN = "0123456789abcdef"
SCENARIO = f"""
[run]
id = "{RUN}"
rounds = 2
[data]
name = "rotten-tomatoes"
nominal_examples = 8
[partition]
name = "iid"
num_clients = 3
[model]
backbone = "minilm"
[peft]
name = "head"
[training]
optimizer = "sgd"
learning_rate = 0.3
batch_size = 8
[cohort]
size = 3
"""
CLIENT_LEVEL = ("privacy.unit='client'",)
SECRET = (*CLIENT_LEVEL, "cohort.sampling='poisson'", "cohort.size=2")


def _entry(plan: Plan, source: str, server_round: int, **changes: Any) -> Entry:
    done = plan.composition()
    if plan.is_secret:
        enrols = server_round == ENROLMENT
        done = plan.composition(plan.max_participations if enrols else 0)
    entry = Entry(
        run=RUN,
        round=server_round,
        data_source=source,
        unit=plan.unit,
        relation=plan.relation,
        mechanism="gaussian",
        noise_multiplier=done.noise_multiplier,
        sampling_rate=done.sampling_rate,
        steps=done.steps,
        clipping_norm=plan.clipping_norm,
        backbone="backbone",
        plan_hash=plan.hash,
        request_hash="",
        payload_hash="",
    )
    return dataclasses.replace(entry, **changes)


def _plan(config: RunConfig) -> Plan:
    plan = make_plan(config)
    assert plan is not None
    return plan


def _append(output: Path, source: str, *entries: Entry) -> None:
    path = output / "ledger" / f"{source}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    ledger = Ledger(output, source, [Entry.from_json(line) for line in lines])
    for entry in entries:
        ledger.append(entry.sealed(ledger.head))


def _write(output: Path, *changes: str) -> Plan:
    """Writes what a run of two rounds with three clients leaves, training aside."""
    config = RunConfig.from_toml(SCENARIO, changes)
    plan = _plan(config)
    replies = 3 if plan.is_dp_sgd else None
    result = {
        "run": RUN,
        "config_hash": config.hash,
        "rounds": [{"round": n, "replies": replies} for n in (1, 2)],
        "privacy": {
            **dataclasses.asdict(plan),
            "spent_epsilon": plan.planned_epsilon,
            "spent_over": "all runs in the ledgers",
        },
    }
    output.mkdir()
    (output / "config.toml").write_text(config.to_toml())
    (output / "result.json").write_text(json.dumps(result))
    rounds = (ENROLMENT, 1, 2) if plan.is_secret else (1, 2)
    for source in ("a", "b", "c"):
        _append(output, source, *(_entry(plan, source, n) for n in rounds))
    return plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    _write(output)
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _checks(output: Path, **options: Any) -> dict[str, Check]:
    config, result = read_run(output)
    options = {"state": output, **options}
    checks = check_records(config, result, "backbone", **options)
    return {check.check: check for check in checks}


def _wrong(output: Path, **options: Any) -> dict[str, tuple[str, bool]]:
    checks = _checks(output, **options).values()
    return {c.check: (c.status, c.falsifies) for c in checks if c.status != "ok"}


def _change(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = output / "result.json"
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


def test_a_run_in_order_passes_every_check(run: Path) -> None:
    checks = _checks(run)
    assert not _wrong(run)
    assert "6 answers that counted" in checks["every answer is charged"].detail


@pytest.mark.parametrize(
    ("name", "factor", "status"),
    [
        ("noise_multiplier", 1 - 1e-12, "ok"),
        ("planned_epsilon", 1 - 1e-8, "ok"),
        ("noise_multiplier", 2.0, "changed"),
        ("noise_multiplier", 0.5, "refuted"),
        ("noise_multiplier", float("nan"), "refuted"),
        ("planned_epsilon", 0.5, "refuted"),
        ("sampling_rate", 0.5, "changed"),
        ("local_steps", 2, "refuted"),
        ("max_participations", 2, "refuted"),
        ("target_delta", 2, "refuted"),
        ("clipping_norm", 2, "changed"),
    ],
)
def test_only_a_plan_that_protects_less_refutes_the_claim(
    run: Path, name: str, factor: float, status: str
) -> None:
    def change(result: dict[str, Any]) -> None:
        result["privacy"][name] *= factor

    _change(run, change)
    check = _checks(run)["plan"]
    assert check.status == ("ok" if status == "ok" else "failed")
    assert check.falsifies == (status != "changed")
    if status == "changed":
        assert check.detail.startswith("made by another version, or changed: " + name)


def test_a_plan_of_another_unit_refutes_the_claim(run: Path) -> None:
    _change(run, lambda result: result["privacy"].update(unit="person"))
    assert _wrong(run) == {"plan": ("failed", True)}


def test_a_plan_written_before_a_field_was_there_is_in_order(run: Path) -> None:
    _change(run, lambda result: result["privacy"].pop("max_examples"))
    assert not _wrong(run)


@pytest.mark.parametrize(
    ("changes", "falsifies"),
    [
        ({"plan_hash": "of another version"}, False),
        ({"clipping_norm": 7.0}, False),
        ({"backbone": "another"}, False),
        ({"noise_multiplier": 50.0, "plan_hash": "x"}, False),
        ({"noise_multiplier": 0.5}, True),
        ({"unit": "person"}, True),
    ],
)
def test_a_release_refutes_the_claim_if_it_protects_less(
    tmp_path: Path, changes: dict[str, Any], falsifies: bool
) -> None:
    output = tmp_path / "run"
    plan = _write(output)
    shutil.rmtree(output / "ledger")
    shutil.rmtree(output / "heads")
    for source in ("a", "b", "c"):
        mine = changes if source == "b" else {}
        _append(output, source, *(_entry(plan, source, n, **mine) for n in (1, 2)))
    wrong = _wrong(output)
    assert wrong.pop("ledger of b") == ("failed", falsifies)
    assert set(wrong) <= {"spent epsilon"}


def test_a_client_that_answered_too_often_refutes_the_claim(run: Path) -> None:
    plan = _plan(read_run(run)[0])
    _append(run, "b", _entry(plan, "b", 2))
    assert _wrong(run)["ledger of b"] == ("failed", True)


def test_what_later_runs_release_is_not_this_runs(run: Path) -> None:
    plan = _plan(read_run(run)[0])
    _append(run, "b", _entry(plan, "b", 1, run=16 * "f"))
    assert not _wrong(run)


def test_a_ledger_deleted_with_every_trace_is_missed(run: Path) -> None:
    (run / "ledger" / "b.jsonl").unlink()
    (run / "heads" / "b.json").unlink()
    assert _wrong(run) == {"every answer is charged": ("failed", True)}
    _change(run, lambda result: result.update(rounds=[]))
    assert _wrong(run) == {"record of every round": ("failed", True)}


def test_the_cohort_says_how_many_answers_a_round_must_have(run: Path) -> None:
    for source in ("b", "c"):
        (run / "ledger" / f"{source}.jsonl").unlink()
        (run / "heads" / f"{source}.json").unlink()
    _change(run, lambda result: [r.update(replies=0) for r in result["rounds"]])
    assert _wrong(run) == {"every answer is charged": ("failed", True)}


@pytest.mark.parametrize("rounds", [[], [1], [1, 1], [2, 1], [1, 2, 3]])
def test_every_round_has_its_record(run: Path, rounds: list[int]) -> None:
    records = [{"round": n, "replies": 3} for n in rounds]
    _change(run, lambda result: result.update(rounds=records))
    assert _wrong(run) == {"record of every round": ("failed", True)}


def test_answers_are_counted_where_no_cohort_is_secret(run: Path) -> None:
    _change(run, lambda result: result["rounds"][1].update(replies=None))
    assert _wrong(run) == {"record of every round": ("failed", True)}


def test_the_result_of_another_run_is_named(run: Path) -> None:
    _change(run, lambda result: result.update(run=16 * "f"))
    check = _checks(run)["configuration"]
    assert (check.status, check.falsifies) == ("failed", False)
    assert 16 * "f" in check.detail


@pytest.mark.parametrize("changes", [CLIENT_LEVEL, SECRET])
def test_client_level_ledgers_are_checked_though_it_is_secret_who_answered(
    tmp_path: Path, changes: tuple[str, ...]
) -> None:
    output = tmp_path / "run"
    _write(output, *changes)
    assert not _wrong(output)
    for source in ("b", "c"):
        (output / "ledger" / f"{source}.jsonl").unlink()
        (output / "heads" / f"{source}.json").unlink()
    assert _wrong(output) == {"every answer is charged": ("failed", True)}


def test_a_report_does_not_tell_how_often_a_client_was_drawn(tmp_path: Path) -> None:
    output = tmp_path / "run"
    plan = _write(output, *SECRET)
    (output / "ledger" / "a.jsonl").unlink()
    (output / "heads" / "a.json").unlink()
    _append(output, "a", _entry(plan, "a", ENROLMENT))
    checks = _checks(output)
    assert checks["ledger of a"].detail == checks["ledger of b"].detail
    assert checks["ledger of a"].status == "ok"


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("privacy", "spent_epsilon", "99"),
        ("privacy", "spent_epsilon", None),
        ("privacy", "planned_epsilon", None),
        ("privacy", "noise_multiplier", "1"),
        ("privacy", "sampling", "any"),
        ("", "replies", "3"),
        ("", "replies", -1),
        ("", "run", None),
    ],
)
def test_a_result_that_is_none_is_named_in_one_line(
    run: Path, section: str, name: str, value: object
) -> None:
    def change(result: dict[str, Any]) -> None:
        place = result["rounds"][0] if name == "replies" else result
        (result[section] if section else place)[name] = value

    _change(run, change)
    with pytest.raises(RunError, match=rf"result[.]json: .*{name}") as caught:
        read_run(run)
    assert "\n" not in str(caught.value)


def _steps(value: object) -> dict[str, Any]:
    return {"steps": value}


@pytest.mark.parametrize(
    "changes", [_steps("3"), _steps(-1), {"noise_multiplier": "x"}, {"round": "1"}]
)
def test_an_entry_that_no_client_writes_is_named(
    run: Path, changes: dict[str, Any]
) -> None:
    plan = _plan(read_run(run)[0])
    _append(run, "b", _entry(plan, "b", 2, **changes))
    with pytest.raises(RunError, match=r"ledger b[.]jsonl"):
        _checks(run)


def test_links_and_devices_are_not_followed(run: Path) -> None:
    path = run / "ledger" / "b.jsonl"
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(RunError, match=r"b[.]jsonl, got a link"):
        _checks(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RunError, match=r"b[.]jsonl, got a link or something else"):
        _checks(run)


def test_ledgers_have_a_largest_size(run: Path) -> None:
    os.truncate(run / "ledger" / "b.jsonl", ledgers.MOST_BYTES + 1)  # sparse
    with pytest.raises(RunError, match="these are no ledgers"):
        _checks(run)


def test_an_answer_whose_ledger_is_gone_is_noticed(run: Path) -> None:
    (run / "outbox" / "d").mkdir(parents=True)
    (run / "outbox" / "d" / "answer.safetensors").touch()
    assert _wrong(run) == {"ledger of d": ("failed", True)}


def _handed_over(run: Path) -> tuple[Path, list[ledgers.Head]]:
    """Moves the ledgers to a folder, and returns what the server knows of them."""
    folder = run.parent / "handed over"
    for part in ("ledger", "heads"):
        shutil.copytree(run / part, folder / part)
        shutil.rmtree(run / part)
    heads = [json.loads(path.read_text()) for path in folder.glob("heads/*.json")]
    return folder, [(head["length"], head["hash"]) for head in heads]


def test_ledgers_that_clients_hand_over_are_held_against_what_the_server_knows(
    run: Path,
) -> None:
    assert _wrong(run, state=run / "nowhere") == {"ledgers": ("unknown", True)}
    folder, told = _handed_over(run)
    assert not _wrong(run, state=folder, told=told)
    other = [*told[:2], (2, 64 * "0")]
    assert _wrong(run, state=folder, told=other) == {
        "ledgers that the server was told of": ("failed", True)
    }


def test_a_ledger_that_was_not_handed_over_refutes_nothing(run: Path) -> None:
    folder, told = _handed_over(run)
    (folder / "ledger" / "b.jsonl").unlink()
    (folder / "heads" / "b.json").unlink()
    assert _wrong(run, state=folder, told=told) == {
        "ledgers that the server was told of": ("unknown", True),
        "every answer is charged": ("unknown", True),
    }


def test_what_a_client_released_in_other_runs_is_not_what_a_server_states(
    run: Path,
) -> None:
    plan = _plan(read_run(run)[0])
    for n in (1, 2):
        _append(run, "d", _entry(plan, "d", n, run=16 * "f"))
    _append(run, "d", _entry(plan, "d", 2))
    assert _wrong(run) == {"spent epsilon": ("failed", True)}
    _change(run, lambda result: result["privacy"].update(spent_over="this run"))
    assert not _wrong(run)


def test_a_released_model_is_read_as_the_runs_own(tmp_path: Path) -> None:
    like = {"head.weight": torch.zeros(2, 3)}
    path = tmp_path / "model" / "adapter.safetensors"
    path.parent.mkdir()
    save_file({"head.weight": torch.ones(2, 3), "more": torch.ones(1)}, path)
    found = read_released(tmp_path, like)
    assert list(found) == ["head.weight"]
    assert found["head.weight"].sum() == 6


@pytest.mark.parametrize(
    "tensors",
    [
        None,
        {"another": torch.ones(2, 3)},
        {"head.weight": torch.ones(3, 2)},
        {"head.weight": torch.full((2, 3), torch.nan)},
    ],
)
def test_what_is_no_model_of_this_run_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor] | None
) -> None:
    path = tmp_path / "model" / "adapter.safetensors"
    path.parent.mkdir()
    if tensors is None:
        path.write_bytes(b"junk")
    else:
        save_file(tensors, path)
    with pytest.raises(RunError, match=r"adapter[.]safetensors"):
        read_released(tmp_path, {"head.weight": torch.zeros(2, 3)})


OTHER = 16 * "f"
"""Another run, whose releases lie in the same ledgers."""


def _forget(output: Path, source: str) -> None:
    (output / "ledger" / f"{source}.jsonl").unlink()
    (output / "heads" / f"{source}.json").unlink()


def test_seeded_noise_in_a_ledger_refutes_a_claim_of_secure_noise(run: Path) -> None:
    plan = _plan(read_run(run)[0])
    _append(run, "b", _entry(plan, "b", 1, run=OTHER, mechanism=SEEDED))
    assert not _wrong(run)  # a rehearsal is not this run
    _forget(run, "b")
    _append(run, "b", *(_entry(plan, "b", n, mechanism=SEEDED) for n in (1, 2)))
    assert _wrong(run) == {"ledger of b": ("failed", True)}
    assert "seeded noise" in _checks(run)["ledger of b"].detail


def test_seeded_noise_that_is_claimed_as_such_refutes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    plan = _write(output, "privacy.noise='seeded'")
    _forget(output, "b")
    _append(output, "b", *(_entry(plan, "b", n, mechanism=SEEDED) for n in (1, 2)))
    assert _wrong(output) == {"noise": ("failed", False)}


def test_a_missing_ledger_does_not_excuse_a_shortened_one(run: Path) -> None:
    folder, told = _handed_over(run)
    entries = (folder / "ledger" / "a.jsonl").read_text().splitlines()
    for source in ("a", "b"):
        _forget(folder, source)
    _append(folder, "a", Entry.from_json(entries[0]))  # a is rolled back, b is missing
    assert _wrong(run, state=folder, told=told) == {
        "ledgers that the server was told of": ("failed", True),
        "every answer is charged": ("unknown", True),
    }


def test_the_ledger_of_a_client_that_never_answered_refutes_nothing(run: Path) -> None:
    plan = _plan(read_run(run)[0])
    told = _handed_over(run)[1][:2]  # of three clients, two have answered
    folder = run.parent / "one alone"
    _append(folder, "d", _entry(plan, "d", 1, run=OTHER))
    assert _wrong(run, state=folder, told=told) == {
        "ledgers that the server was told of": ("unknown", True),
        "every answer is charged": ("unknown", True),
    }


def test_ledgers_of_clients_that_were_never_asked_make_up_for_none(run: Path) -> None:
    plan = _plan(read_run(run)[0])
    folder, told = _handed_over(run)
    told = told[:2]  # of three clients, two have answered
    kept = {(told[0][0], told[0][1])}
    for path in sorted(folder.glob("heads/*.json")):
        head = json.loads(path.read_text())
        if (head["length"], head["hash"]) not in kept:
            _forget(folder, path.stem)
    _append(folder, "d", _entry(plan, "d", 1, run=OTHER))
    assert _wrong(run, state=folder, told=told) == {
        "ledgers that the server was told of": ("unknown", True),
        "every answer is charged": ("unknown", True),
    }


def test_the_worst_ledger_counts_with_all_its_runs(run: Path) -> None:
    plan = _plan(read_run(run)[0])
    once = plan.composition()
    assert ledgers.worst_epsilon(run, 1e-5) == epsilon(2 * [once], 1e-5)
    _append(run, "d", *(_entry(plan, "d", n, run=OTHER) for n in (1, 2)))
    _append(run, "d", _entry(plan, "d", 1))
    assert ledgers.worst_epsilon(run, 1e-5) == epsilon(3 * [once], 1e-5)
    assert ledgers.worst_epsilon(run / "nowhere", 1e-5) == 0
    _append(run, "d", _entry(plan, "d", 3, run=OTHER, relation="replace-one"))
    assert ledgers.worst_epsilon(run, 1e-5) == math.inf  # relations are never added


def test_what_a_runs_own_files_show_takes_no_replay() -> None:
    for module in (evidence, ledgers, weakening):
        assert "audit.trials" not in Path(str(module.__file__)).read_text()
