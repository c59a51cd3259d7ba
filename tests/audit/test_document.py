"""``report.json``: against its schema, and back to the audit it was made of."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit import results
from fedpeft.audit.document import (
    from_document,
    schema,
    to_document,
    to_text,
    without_folders,
)
from fedpeft.audit.findings import Finding
from fedpeft.audit.gates import Gate, judge_policy
from fedpeft.audit.policy import default_policy
from fedpeft.errors import ConfigError
from tests.audit.examples import ALL, audit, estimate, open_audit, span_text
from tests.helpers import small_config

VALIDATOR = Draft202012Validator(schema())


def document(name: str = "usual") -> dict[str, Any]:
    found = ALL[name]()
    return to_document(found, judge_policy(default_policy(), found))


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("name", ALL)
def test_every_report_is_valid_and_comes_back_equal(name: str) -> None:
    read = json.loads(to_text(document(name)))
    VALIDATOR.validate(read)
    assert from_document(read) == ALL[name]()


def test_the_keys_are_those_that_readers_rely_on() -> None:
    found = document()
    assert set(found) >= {
        *("schema_version", "run", "system", "federation", "release", "dp_claim"),
        *("threat_models", "attacks", "dp_audit", "surface", "rank_budget"),
        *("integrity_checks", "gates", "limitations", "provenance"),
    }
    first = found["attacks"][0]
    assert set(first) >= {"id", "threat", "n", "baseline", "prior_only", "metrics"}
    assert set(first["metrics"]["token_top1"]) == {"value", "ci_lo", "ci_hi", "method"}
    assert first["threat"] in {threat["id"] for threat in found["threat_models"]}


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("attack", results.AttackResult),
        ("slice", results.Slice),
        ("exhibit", results.Exhibit),
        ("bound", results.BoundResult),
        ("trial", results.DpTrial),
        ("check", results.Check),
        ("claim", results.Claim),
        ("rank", results.RankBudget),
        ("gate", Gate),
        ("finding", Finding),
        ("threat", ThreatModel),
        ("estimate", results.Estimate),
    ],
)
def test_the_schema_knows_every_field(name: str, record: type) -> None:
    renamed = {"attack": "id", "records": "n", "low": "ci_lo", "high": "ci_hi"}
    back = {} if name == "gate" else renamed
    fields = {back.get(f.name, f.name) for f in dataclasses.fields(record)}
    known = set(schema()["$defs"][name]["properties"])
    assert known - {"description" if name == "threat" else ""} == fields | (
        {"id"} if name == "threat" else set()
    )


def test_what_is_unbounded_or_unknown_is_still_json() -> None:
    odd = span_text()
    odd.metrics["token_top1"] = estimate(math.inf, math.nan, -math.inf)
    odd.values["token_top1"] = (math.inf, math.nan)
    found = audit(attacks=(odd,))
    written = to_document(found, judge_policy(default_policy(), found))
    assert written["attacks"][0]["values"]["token_top1"] == ["infinity", None]
    metric = written["attacks"][0]["metrics"]["token_top1"]
    assert (metric["value"], metric["ci_lo"], metric["ci_hi"]) == (
        "infinity",
        None,
        "-infinity",
    )
    VALIDATOR.validate(json.loads(to_text(written)))


def test_a_report_from_before_single_records_were_kept_still_opens() -> None:
    old = document("open")
    new = ("values", "control_values", "by_class", "exhibits")
    for attack in (*old["attacks"], *old["surface"]):
        for key in new:
            attack.pop(key)
    VALIDATOR.validate(old)
    found = from_document(old)
    assert found.attacks == tuple(each.in_short() for each in open_audit().attacks)


def test_what_is_shown_of_the_run_itself_is_no_report() -> None:
    shown = document("open")
    first = shown["attacks"][0]
    assert first["exhibits"]
    first["column"] = "this-run"
    with pytest.raises(ValidationError):
        VALIDATOR.validate(shown)
    with pytest.raises(ConfigError, match="exhibits of a replay alone"):
        from_document(shown)


def test_no_privacy_is_null() -> None:
    found = open_audit()
    assert to_document(found, judge_policy(default_policy(), found))["dp_claim"] is None


def test_the_outcome_is_the_exit_code() -> None:
    assert document()["outcome"] == {"name": "pass", "exit_code": 0}
    assert document("falsified")["outcome"] == {"name": "falsified", "exit_code": 2}
    assert document()["gates"][0]["subject"] == "claim"


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"schema_version": 2},
        {"attacks": [{}]},
        {"dp_claim": {"unit": "hospital"}},
        {"gates": []},
    ],
)
def test_the_schema_refuses_what_is_no_report(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VALIDATOR.validate({**document(), **change})


def test_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="schema_version 1, got 2"):
        from_document({**document(), "schema_version": 2})


@pytest.mark.parametrize("key", ["attacks", "run", "threat_models", "config"])
def test_a_report_with_a_part_cut_off_is_refused(key: str) -> None:
    cut = document()
    (cut["run"] if key == "config" else cut).pop(key)
    with pytest.raises(ConfigError, match="Expected a whole report"):
        from_document(cut)


def test_no_folder_of_the_machine_stands_in_a_report() -> None:
    own = ("run.state='/home/ward/ledgers'", "model.backbone='/home/ward/bert'")
    shown = without_folders(small_config(Path("/home/ward/cases.csv"), *own))
    assert "ward" not in json.dumps(shown)
    assert shown["data"]["path"] == "cases.csv"
    assert shown["run"]["state"] == "ledgers"
    assert shown["model"]["backbone"] == "bert"
    named = without_folders(small_config(Path("x.csv"), "model.backbone='hub:a/b'"))
    assert (named["run"]["state"], named["model"]["backbone"]) == (None, "hub:a/b")
