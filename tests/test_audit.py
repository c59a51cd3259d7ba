"""An audit from end to end: a recorded run, its replay, and the files of the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeft import keys
from fedpeft.audit.evidence import check_records, read_run
from fedpeft.audit.observing import seen_by_client
from fedpeft.audit.page.first_page import odds
from fedpeft.audit.recording import Recorder, read_records
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, DataError, RunError
from fedpeft.model import build_model
from fedpeft.privacy import epsilon, make_plan, open_ledger
from simulations.attacking import attacks_of, run_attacks
from simulations.audit import audit_run, audit_scenario, spent_epsilon
from simulations.engine import simulate
from simulations.observing import cases_of, observe, set_stage, with_candidates
from simulations.replaying import public, with_settings
from tests.helpers import small_config

NAMED = """
[run]
rounds = 2
workers = 0
[data]
name = "rotten-tomatoes"
max_examples = 60
nominal_examples = 8
test_fraction = 0.2
max_length = 32
[partition]
name = "iid"
num_clients = 3
[model]
backbone = "minilm"
[peft]
name = "lora"
rank = 4
[training]
optimizer = "sgd"
learning_rate = 0.3
batch_size = 8
[cohort]
size = 3
[privacy]
noise = "seeded"
[audit]
decoys = 20
non_members = 10
dp_seconds = 5
sample_canaries = 12
attacks = ["rank_budget", "head_leak"]
"""


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return keys.create_auditor(tmp_path_factory.mktemp("office"), "office")


@pytest.fixture(scope="module")
def recorded(
    office: tuple[Path, str], minilm: Path, rotten_tomatoes: Path, tmp_path_factory
) -> Path:
    output = tmp_path_factory.mktemp("audited") / "run"
    recording = f"audit.auditor='{office[1]}'"
    config = RunConfig.from_toml(NAMED, ["audit.record=true", recording])
    simulate(config, output)
    return output


def test_what_is_recorded_adds_up_to_what_the_server_did(
    recorded: Path, office: tuple[Path, str]
) -> None:
    config = RunConfig.from_file(recorded / "config.toml")
    records = read_records(recorded, config.run.id, keys.read_auditor(office[0]))
    seen = seen_by_client(records, config, build_model(config, 2))
    assert [part.server_round for part in seen[2]] == [1, 2]
    last = [parts[-1] for parts in seen.values()]
    model = load_file(recorded / "model" / "adapter.safetensors")
    for name, start in last[0].state.items():
        step = torch.stack([part.update[name] for part in last]).mean(0)
        assert (start + step).allclose(model[name], atol=1e-6)


def test_no_private_number_is_on_the_wire(
    recorded: Path, office: tuple[Path, str]
) -> None:
    config = RunConfig.from_file(recorded / "config.toml")
    records = read_records(recorded, config.run.id, keys.read_auditor(office[0]))
    assert {answer.header["num_examples"] for answer in records.answers} == {-1}


def test_decoys_and_surrogate_are_nobodys_records(recorded: Path) -> None:
    stage = set_stage(RunConfig.from_file(recorded / "config.toml"))
    held = {text for part in stage.parts for text in part.contents}
    decoys, surrogate = set(stage.decoys.contents), set(stage.surrogate.contents)
    assert len(held) == 48
    assert len(decoys) == 20
    assert not decoys & surrogate
    assert not (decoys | surrogate) & held


def test_a_victims_case_holds_its_own_records(
    recorded: Path, office: tuple[Path, str]
) -> None:
    config = RunConfig.from_file(recorded / "config.toml")
    records = read_records(recorded, config.run.id, keys.read_auditor(office[0]))
    stage = set_stage(config)
    cases = cases_of(stage, records, None)
    assert len(cases) == 3
    for case, part in zip(cases, stage.parts, strict=True):
        own = stage.model.task.encode(part)
        assert [t.tolist() for t in case.secret.examples.inputs] == [
            t.tolist() for t in own.inputs
        ]
        assert len(case.observation.others) == 2


def test_who_reckons_with_adamws_steps_knows_how_clients_train(
    recorded: Path, office: tuple[Path, str]
) -> None:
    config = RunConfig.from_file(recorded / "config.toml")
    records = read_records(recorded, config.run.id, keys.read_auditor(office[0]))
    stage = set_stage(config)
    cases = cases_of(stage, records, None)
    adamw = RunConfig.from_toml(config.to_toml(), ["training.optimizer=adamw"])
    for each, letter in ((stage, "A"), (replace(stage, config=adamw), "C")):
        results = run_attacks(each, cases, "replay", print)
        assert {result.threat.adversary for result in results} == {letter}


def test_the_two_columns_are_kept_apart(
    recorded: Path, office: tuple[Path, str]
) -> None:
    said: list[str] = []
    audit = audit_run(recorded, key=keys.read_auditor(office[0]), say=said.append)
    columns = [(result.attack, result.column) for result in audit.attacks]
    assert columns == [
        ("rank_budget", "this-run"),
        ("head_leak", "this-run"),
        ("rank_budget", "replay"),
        ("head_leak", "replay"),
    ]
    assert audit.claim is not None
    assert audit.claim.spent_epsilon <= audit.claim.planned_epsilon * (1 + 1e-9)
    assert not any(trial.falsified for trial in audit.dp_trials)
    trials = {trial.trial for trial in audit.dp_trials}
    assert trials >= {"gradient canary", "whole run", "sample canaries"}
    wrong = [check.check for check in audit.checks if check.status == "failed"]
    assert wrong == ["noise"]  # seeded, so that this test is repeatable
    assert any("attack: head_leak" in line for line in said)


def test_without_the_key_what_was_recorded_stays_closed(recorded: Path) -> None:
    audit = audit_run(recorded, say=lambda text: None)
    assert {result.column for result in audit.attacks} == {"replay"}
    assert any("no auditor's key" in limit for limit in audit.limitations)
    assert any("[audit] aggregate = true" in limit for limit in audit.limitations)


def _handed_over(recorded: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Returns a copy of the run without the clients' ledgers, and where these lie."""
    output, folder = tmp_path / "run", tmp_path / "handed over"
    shutil.copytree(recorded, output)
    shutil.rmtree(output / "outbox")
    for part in ("ledger", "heads"):
        shutil.move(output / part, folder / part)
    return output, folder


def test_ledgers_that_clients_hand_over_vouch_for_a_run(
    recorded: Path, tmp_path: Path
) -> None:
    output, folder = _handed_over(recorded, tmp_path)
    brief = ("audit.attacks=['rank_budget']", "audit.dp_seconds=1", "audit.rounds=1")
    audit = audit_run(output, ledgers=folder, overrides=brief, say=lambda text: None)
    found = {check.check: check.status for check in audit.checks}
    assert found["ledgers that the server was told of"] == "ok"
    assert found["every answer is charged"] == "ok"
    assert [name for name in found if found[name] == "failed"] == ["noise"]


def _failed(output: Path) -> dict[str, bool]:
    """Returns the checks that failed, and whether each refutes the claim."""
    config, result = read_run(output)
    fingerprint = set_stage(config).model.fingerprint
    checks = check_records(config, result, fingerprint, output)
    return {
        check.check: check.falsifies for check in checks if check.status == "failed"
    }


def test_a_run_that_lost_a_ledger_entry_is_refuted(
    recorded: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(recorded, output)
    path = next((output / "ledger").glob("*.jsonl"))
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    failed = _failed(output)
    assert failed.pop("noise") is False
    assert failed.pop("every answer is charged") is True
    assert all(failed.values())


def test_an_epsilon_stated_too_small_is_refuted(recorded: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(recorded, output)
    result = json.loads((output / "result.json").read_text())
    result["privacy"]["spent_epsilon"] /= 2
    (output / "result.json").write_text(json.dumps(result))
    assert _failed(output) == {"noise": False, "spent epsilon": True}


def test_another_plan_or_configuration_than_stated_is_noticed(
    recorded: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(recorded, output)
    text = (output / "config.toml").read_text()
    looser = text.replace("target_epsilon = 8.0", "target_epsilon = 7.0")
    (output / "config.toml").write_text(looser)
    failed = _failed(output)
    assert failed["configuration"] is False
    assert failed["plan"] is True


def test_without_ledgers_nothing_vouches_for_the_epsilon(
    recorded: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(recorded, output)
    shutil.rmtree(output / "ledger")
    shutil.rmtree(output / "heads")
    shutil.rmtree(output / "outbox")
    config, result = read_run(output)
    checks = check_records(config, result, "a fingerprint", output)
    unknown = [check for check in checks if check.status == "unknown"]
    assert [(check.check, check.falsifies) for check in unknown] == [("ledgers", True)]


def test_an_audit_leaves_the_evidence_as_it_found_it(
    recorded: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(recorded, output)
    path = next((output / "ledger").glob("*.jsonl"))
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    files = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    assert _failed(output) == _failed(output)
    assert files == {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": "all"}, "rounds: expected"),
        ({"privacy": None}, "privacy"),
        ({"privacy": {"unit": "example", "planned_epsilon": "NaN"}}, "planned_epsilon"),
        ({"config_hash": 3}, "config_hash"),
    ],
)
def test_a_result_of_another_shape_is_named(
    recorded: Path, tmp_path: Path, change: dict, message: str
) -> None:
    output = tmp_path / "run"
    shutil.copytree(recorded, output)
    result = json.loads((output / "result.json").read_text())
    (output / "result.json").write_text(json.dumps({**result, **change}))
    with pytest.raises(RunError, match=message):
        read_run(output)
    (output / "result.json").write_bytes(b"\xff{")
    with pytest.raises(RunError, match="Expected JSON"):
        read_run(output)


def test_an_answer_that_is_no_update_spoils_no_other(
    recorded: Path, office: tuple[Path, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(recorded, output)
    config = RunConfig.from_file(output / "config.toml")
    Recorder(output, config.run.id, office[1]).answer(1, 0, {"code": "ok"}, b"junk")
    records = read_records(output, config.run.id, keys.read_auditor(office[0]))
    seen = seen_by_client(records, config, build_model(config, 2))
    assert [len(seen[client]) for client in (0, 1, 2)] == [1, 2, 2]


def test_a_replay_charges_nobody(
    minilm: Path, rotten_tomatoes: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    config = RunConfig.from_toml(NAMED, [f"run.state='{state}'", "run.rounds=1"])
    observe(config, tmp_path / "replay")
    assert not state.exists()


def test_secret_cohorts_are_replayed_on_public_data(
    minilm: Path, rotten_tomatoes: Path, tmp_path: Path
) -> None:
    changes = ["privacy.unit='client'", "cohort.sampling='poisson'", "run.rounds=1"]
    config = RunConfig.from_toml(NAMED, changes)
    cases = observe(config, tmp_path / "replay")
    assert all(len(case.observation.seen) == 1 for case in cases)


@pytest.mark.slow
def test_what_a_crafted_state_gets_is_measured_and_its_refusal_said(
    minilm: Path, rotten_tomatoes: Path, tmp_path: Path
) -> None:
    changes = [
        "peft={name='bottleneck', width=16}",
        "privacy.unit='none'",
        "run.rounds=1",
        "audit.attacks=['malicious_adapter']",
    ]
    config = RunConfig.from_toml(NAMED, changes)
    cases = observe(config, tmp_path / "run")
    (result,) = run_attacks(set_stage(config), cases, "replay", lambda text: None)
    assert result.misfit is None
    assert result.victims == 3
    assert result.settings["clients refuse the state"] is True


@pytest.mark.slow
def test_the_final_model_is_attacked_with_references(
    minilm: Path, rotten_tomatoes: Path, tmp_path: Path
) -> None:
    changes = [
        "peft.name='head'",
        "run.rounds=1",
        "audit.attacks=[{name='shadow_membership', method='lira'}]",
    ]
    text = NAMED.replace("rank = 4\n", "")
    config = RunConfig.from_toml(text, changes)
    cases = observe(config, tmp_path / "run")
    (result,) = run_attacks(set_stage(config), cases, "replay", lambda text: None)
    assert result.misfit is None
    assert result.threat.access == "final-model"
    assert 0 <= result.metrics["auc"].value <= 1


def test_private_data_have_a_public_stand_in(small_reviews: Path) -> None:
    config = small_config(small_reviews)
    replayed = public(config)
    assert replayed.data.name == "rotten-tomatoes"
    assert replayed.data.path is None
    assert replayed.privacy == config.privacy
    assert replayed.training == config.training
    named = RunConfig.from_toml(NAMED)
    assert public(named) is named


PERSONS = (
    "privacy.unit='person'",
    "data.person='film'",
    "data.nominal_persons=5",
    "data.multi_label=true",
    "training.batch_size=5",
    "run.rounds=1",
    "partition.name='iid'",
)
QUICK = (
    "audit.attacks=['rank_budget']",
    "audit.dp_seconds=1",
    "audit.sample_canaries=0",
    "audit.decoys=20",
)


def test_persons_of_a_stand_in_have_one_record_each(small_reviews: Path) -> None:
    config = small_config(small_reviews, *PERSONS)
    replayed = public(config)
    assert replayed.privacy.unit == "example"
    assert replayed.data.nominal_examples == 5
    assert not replayed.data.multi_label
    own, other = make_plan(config), make_plan(replayed)
    assert own is not None
    assert other is not None
    assert own.noise_multiplier == other.noise_multiplier
    assert own.planned_epsilon == other.planned_epsilon


def test_what_cannot_be_replayed_is_one_line(small_reviews: Path) -> None:
    config = small_config(small_reviews, "data.nominal_examples=4611686018427387904")
    with pytest.raises(ConfigError, match=r"^No replay on public data: .*64 bits"):
        public(config)


def test_a_run_by_person_with_several_labels_of_its_own_file_is_audited(
    small_reviews: Path, tmp_path: Path
) -> None:
    simulate(small_config(small_reviews, *PERSONS), tmp_path / "run")
    audit = audit_run(tmp_path / "run", overrides=QUICK, say=lambda text: None)
    (result,) = audit.attacks
    assert (result.attack, result.column) == ("rank_budget", "replay")
    assert result.victims == 2
    assert audit.claim is not None
    assert audit.claim.unit == "person"
    assert any("each person of the stand-in" in limit for limit in audit.limitations)
    assert audit.config["data"]["path"] == "reviews.csv"
    assert audit.config["audit"]["attacks"] == [{"name": "rank_budget"}]
    assert str(tmp_path) not in repr(audit)
    assert audit.config_hash == read_run(tmp_path / "run")[0].hash


@pytest.mark.parametrize(
    "override",
    [
        "run.rounds=1",
        "audit.record=true",
        "audit.auditor='0'",
        "audit={victims=2}",
        "audit",
        "auditor.x=1",
    ],
)
def test_an_auditor_changes_nothing_of_the_run(override: str) -> None:
    config = RunConfig.from_toml(NAMED)
    with pytest.raises(ConfigError, match=r"^--set: expected audit.KEY=VALUE"):
        with_settings(config, [override])
    changed = with_settings(config, ["audit.victims=7", "audit.attacks=['exposure']"])
    assert changed.audit.victims == 7
    assert changed.hash == config.hash
    with pytest.raises(ConfigError, match="did you mean 'victims'"):
        with_settings(config, ["audit.victms=7"])


def test_a_scenario_is_audited_again_where_it_was(recorded: Path, office) -> None:
    recording = ["audit.record=true", f"audit.auditor='{office[1]}'", *QUICK]
    config = RunConfig.from_toml(NAMED, recording)
    files = {p: p.read_bytes() for p in recorded.rglob("*") if p.is_file()}
    audit = audit_scenario(config, recorded.parent, say=lambda text: None)
    assert [result.column for result in audit.attacks] == ["replay"]
    assert files == {p: p.read_bytes() for p in recorded.rglob("*") if p.is_file()}
    other = RunConfig.from_toml(NAMED, [*recording, "run.seed=1"])
    with pytest.raises(RunError, match="run of another: choose another output"):
        audit_scenario(other, recorded.parent, say=lambda text: None)


def test_every_victim_has_non_members_of_its_own(
    recorded: Path, office: tuple[Path, str]
) -> None:
    config = RunConfig.from_file(recorded / "config.toml")
    records = read_records(recorded, config.run.id, keys.read_auditor(office[0]))
    cases = cases_of(set_stage(config), records, None)

    def asked() -> list[list[list[int]]]:
        found = [
            case.observation.candidates for case in with_candidates(cases, members=8)
        ]
        return [[t.tolist() for t in each.inputs[8:]] for each in found]

    first, second, _ = asked()
    assert len(first) == len(second) == 10
    assert first != second
    assert asked() == [first, second, _]


def test_an_unfinished_run_is_no_run_to_audit(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no config[.]toml"):
        audit_run(tmp_path)
    (tmp_path / "config.toml").write_text(RunConfig.from_toml(NAMED).to_toml())
    with pytest.raises(RunError, match="finished run"):
        audit_run(tmp_path)


def test_a_key_for_a_run_that_recorded_nothing_is_an_error(
    office: tuple[Path, str], minilm: Path, rotten_tomatoes: Path, tmp_path: Path
) -> None:
    simulate(RunConfig.from_toml(NAMED, ["run.rounds=1"]), tmp_path / "run")
    with pytest.raises(DataError, match="was not recorded"):
        audit_run(tmp_path / "run", key=keys.read_auditor(office[0]))


def test_an_unknown_attack_names_the_nearest() -> None:
    config = RunConfig.from_toml(NAMED, ["audit.attacks=['head_leek']"])
    with pytest.raises(ConfigError, match="head_leak"):
        attacks_of(config)


def test_secret_cohorts_are_not_recorded(office: tuple[Path, str]) -> None:
    changes = [
        "audit.record=true",
        f"audit.auditor='{office[1]}'",
        "privacy.unit='client'",
        "cohort.sampling='poisson'",
    ]
    with pytest.raises(ConfigError, match="who was drawn is a secret"):
        RunConfig.from_toml(NAMED, changes)
    with pytest.raises(ConfigError, match="fedpeft keys auditor"):
        RunConfig.from_toml(NAMED, changes[:1])


def _restate(output: Path, **changes: object) -> None:
    result = json.loads((output / "result.json").read_text())
    result["privacy"].update(changes)
    (output / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("stated", [12.0, 1.0])
def test_without_ledgers_no_less_is_spent_than_is_planned_and_stated(
    recorded: Path, tmp_path: Path, stated: float
) -> None:
    output = tmp_path / "run"
    shutil.copytree(recorded, output)
    for part in ("ledger", "heads", "outbox"):
        shutil.rmtree(output / part)
    _restate(output, spent_epsilon=stated)
    config, result = read_run(output)
    checks = check_records(config, result, "a fingerprint", output)
    planned = result["privacy"]["planned_epsilon"]
    assert 7 < planned <= 8
    spent = spent_epsilon(config, result, checks, output)
    assert spent == pytest.approx(max(stated, planned))


def test_ledgers_that_clients_hand_over_tell_what_other_runs_have_spent(
    recorded: Path, tmp_path: Path
) -> None:
    output, folder = _handed_over(recorded, tmp_path)
    source = min(path.stem for path in (folder / "ledger").glob("*.jsonl"))
    ledger = open_ledger(folder, source)
    for entry in tuple(ledger.entries):
        ledger.append(replace(entry, run=16 * "f").sealed(ledger.head))
    _restate(output, spent_over="this run")
    brief = [*QUICK, "audit.rounds=1"]
    audit = audit_run(output, ledgers=folder, overrides=brief, say=lambda text: None)
    assert [c.check for c in audit.checks if c.status == "failed"] == ["noise"]
    assert audit.claim is not None
    four = [entry.composition for entry in ledger.entries]
    assert audit.claim.spent_epsilon == epsilon(four, audit.claim.delta) > 8
    assert odds(audit).is_exceeded
