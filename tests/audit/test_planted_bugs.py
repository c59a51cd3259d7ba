"""The auditor is audited: bugs that raise epsilon are found, others are not.

A few of those that ``simulations.benchmarks.audited_auditor`` plants; its committed
result has them all.
"""

import json

import pytest

from simulations.benchmarks import audited_auditor
from simulations.benchmarks.audited_auditor import EXPECTED, measure, plan_of
from tests.privacy.test_planted_bugs import BUGS, ROOT, Bug

RESULTS = ROOT / "simulations" / "results" / "audited_auditor.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug",
    [
        "noise scaled by the batch",
        "ledger written after sending",
        "person's rows clipped one by one",
        "a client's update unclipped",
    ],
)
def test_a_planted_bug_is_found_if_it_raises_epsilon_and_else_is_not(bug: str) -> None:
    row = measure(bug, budgets=[1.0, 60.0])
    assert row["as_expected"], row


def test_every_planted_bug_has_an_expected_effect_on_epsilon() -> None:
    assert list(EXPECTED) == list(BUGS)


def test_a_bug_raises_epsilon_if_and_only_if_the_truth_is_above_the_claim() -> None:
    for expected in EXPECTED.values():
        plan = plan_of(expected.unit)
        claimed = (expected.claimed or (lambda p: p.planned_epsilon))(plan)
        truth = expected.truth(plan) if expected.truth else claimed
        assert (truth > claimed) == (expected.effect == "raises")


def test_the_committed_result_is_of_all_bugs_and_as_expected() -> None:
    result = json.loads(RESULTS.read_text())
    assert [row["bug"] for row in result["bugs"]] == list(BUGS)
    assert all(row["as_expected"] for row in result["bugs"])
    assert not any(row["falsified"] for row in result["no_bug"])
    assert max(row["seconds"] for row in result["bugs"]) <= 600


def test_a_line_that_is_gone_is_an_error(tmp_path, monkeypatch) -> None:
    gone = {"gone": Bug("pyproject.toml", "gone", "", "")}
    tests = audited_auditor.importlib.import_module("tests.privacy.test_planted_bugs")
    monkeypatch.setattr(tests, "BUGS", gone)
    monkeypatch.setattr(tests, "PACKAGES", ("pyproject.toml",))
    with pytest.raises(ValueError, match="expected one such line"):
        audited_auditor.plant("gone", tmp_path)
