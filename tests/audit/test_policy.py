"""Policies: their grammar, and what they make of an audit."""

import math
from dataclasses import replace

import pytest

from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.gates import Gate, judge_claim, judge_policy
from fedpeft.audit.policy import default_policy, fits, parse_policy, read_policy
from fedpeft.audit.results import Audit, Check
from fedpeft.errors import ConfigError
from tests.audit.examples import (
    ALL,
    attack,
    audit,
    bare_audit,
    claim,
    estimate,
    falsified_audit,
    inconclusive_audit,
    misfit,
    open_audit,
    seeded_audit,
    span_text,
    trial,
)

LEAK = (
    '[[line]]\ncolumn = "replay"\nmetric = "span_text.token_top1"\nleak_at_most = 0.05'
)

CLAIM = '[[line]]\ncolumn = "this-run"\nmetric = "claim.{}"\nat_most = 8'


def line(text: str, found: Audit) -> Gate:
    (gate,) = judge_policy(parse_policy(f"[[line]]\n{text}", "a policy"), found).lines
    return gate


def claimed(metric: str, limit: str, found: Audit) -> str:
    text = f'column = "this-run"\nmetric = "claim.{metric}"\n{limit}'
    return line(text, found).status


def leak(
    metric: str, found: Audit, column: str = "replay", limit: float = 0.05
) -> Gate:
    text = f'column = "{column}"\nmetric = "{metric}"\nleak_at_most = {limit}'
    return line(text, found)


def with_difference(low: float, high: float) -> Audit:
    result = span_text()
    result.difference["token_top1"] = estimate((low + high) / 2, low, high)
    return audit(attacks=(result,))


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        (0.06, 0.20, "fail"),
        (0.02, 0.20, "inconclusive"),
        (-0.02, 0.05, "pass"),
        (math.nan, math.nan, "inconclusive"),
    ],
)
def test_a_whole_interval_decides(low: float, high: float, status: str) -> None:
    assert leak("span_text.token_top1", with_difference(low, high)).status == status


@pytest.mark.parametrize(
    ("metric", "column", "reason"),
    [
        ("exposure.exposure", "replay", "no such attack was run"),
        ("span_text.token_top1", "this-run", "no such attack was run"),
        ("span_image.psnr", "replay", "the task is about text"),
        ("span_text.token_top", "replay", "did you mean 'token_top1'?"),
        ("*.psnr", "replay", "the task is about text"),
    ],
)
def test_what_was_not_measured_never_passes(
    metric: str, column: str, reason: str
) -> None:
    gate = leak(metric, audit(), column)
    assert gate.status == "inconclusive"
    assert reason in gate.detail


def test_a_figure_without_a_control_never_passes_as_a_leak() -> None:
    lonely = replace(span_text(0.0), prior_only={}, difference={})
    gate = leak("span_text.token_top1", audit(attacks=(lonely,)))
    assert gate.status == "inconclusive"
    assert "has no prior-only control" in gate.detail


def test_the_worst_of_several_results_counts() -> None:
    several = audit(attacks=(span_text(0.03), span_text(0.9, local_steps=5), misfit()))
    gate = leak("span_text.token_top1", several)
    assert gate.status == "fail"
    assert gate.observed == pytest.approx(0.869)
    assert leak("*.*", several).status == "fail"


def test_any_share_leaves_out_decibels_and_what_merely_lies_open() -> None:
    exposed = attack(
        "rank_budget",
        {"identification_top1": ("share", 1.0, 0.0, 0.0)},
        ThreatModel("A", "update", "expose"),
    )
    images = attack("gradient_matching", {"psnr": ("dB", 40.0, 8.0, 8.0)})
    found = audit(attacks=(exposed, images, span_text(0.02)))
    assert leak("*.*", found).status == "pass"
    assert leak("*.*", audit(attacks=(exposed, images))).status == "inconclusive"


def test_a_level_is_judged_by_the_attack_itself() -> None:
    text = 'column = "replay"\nmetric = "span_text.token_top1"\nat_most = 0.5'
    assert line(text, audit()).status == "pass"
    assert line(text, open_audit()).status == "fail"


def test_claims_are_judged_by_their_figures() -> None:
    assert claimed("spent_epsilon", "at_most = 8", audit()) == "pass"
    assert claimed("spent_epsilon", "at_most = 7.9", audit()) == "fail"
    assert claimed("noise", 'equals = "secure"', audit()) == "pass"
    assert claimed("noise", 'equals = "secure"', seeded_audit()) == "fail"
    assert claimed("largest_success.1000", "at_most = 0.32", audit()) == "pass"
    assert claimed("largest_success.7", "at_most = 0.32", audit()) == "inconclusive"


def test_a_run_without_privacy_keeps_to_no_epsilon() -> None:
    found = audit(claim=None)
    assert claimed("spent_epsilon", "at_most = 100", found) == "fail"
    assert judge_claim(found).status == "not-claimed"


def test_checks_are_judged_by_name() -> None:
    def status(pattern: str, *checks: Check) -> str:
        text = f'column = "this-run"\ncheck = "{pattern}"'
        return line(text, audit(checks=checks)).status

    good, bad = Check("ledger of a", "ok", ""), Check("ledger of b", "failed", "Torn.")
    unknown = Check("backbone", "unknown", "No copy is at hand.")
    assert status("ledger of *", good) == "pass"
    assert status("ledger of *", good, bad, unknown) == "fail"
    assert status("ledger of a", good, bad) == "pass"
    assert status("*", good, unknown) == "inconclusive"
    assert status("ledger", good, bad) == "inconclusive"
    assert status("*") == "inconclusive"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("usual", 0),
        ("open", 1),
        ("falsified", 2),
        ("bare", 3),
        ("seeded", 1),
        ("inconclusive", 3),
        ("extreme", 1),
        ("crowded", 2),
    ],
)
def test_the_default_policy_judges_every_audit(name: str, code: int) -> None:
    assert judge_policy(default_policy(), ALL[name]()).exit_code == code


def test_a_refuted_claim_weighs_more_than_leakage_and_that_than_doubt() -> None:
    doubtful = (misfit(),)
    policy = default_policy()
    leaking = audit(attacks=(span_text(),), claim=claim(noise="seeded"))
    assert judge_policy(policy, replace(falsified_audit(), attacks=())).exit_code == 2
    assert judge_policy(policy, replace(leaking, checks=())).exit_code == 1
    assert judge_policy(policy, audit(attacks=doubtful)).exit_code == 3


def test_one_failed_check_that_falsifies_refutes_the_claim() -> None:
    broken = audit(checks=(Check("noise twice", "failed", "Equal noise.", True),))
    assert judge_claim(broken).status == "fail"
    harmless = audit(checks=(Check("colour", "failed", "Blue."),))
    assert judge_claim(harmless).status == "pass"


@pytest.mark.parametrize("trials", [(), (trial(),)])
def test_a_check_that_could_refute_and_could_not_be_made_is_no_pass(trials) -> None:
    fine = Check("plan", "ok", "As computed anew.", True)
    unknown = Check("ledgers", "unknown", "They are not at hand.", True)
    gate = judge_claim(audit(checks=(fine, unknown), dp_trials=trials))
    assert gate.status == "inconclusive"
    assert gate.detail == "Could not be checked: ledgers."
    assert judge_claim(audit(checks=(fine,), dp_trials=trials)).status == "pass"
    broken = Check("noise twice", "failed", "Equal noise.", True)
    assert judge_claim(audit(checks=(unknown, broken))).status == "fail"


def test_what_the_trials_could_have_shown_stands_beside_the_claim() -> None:
    gate = judge_claim(audit())
    assert gate.status == "pass"
    assert gate.detail.endswith(
        "What is nearest to a whole run could have shown 7.02 of 7.94."
    )
    nothing = judge_claim(audit(dp_trials=(trial(bounds=()),)))
    assert nothing.detail.endswith("No trial could have shown any epsilon.")


@pytest.mark.parametrize(
    ("victims", "limit", "words"),
    [
        (35, 0.1, "There were 35 victims; this limit takes at least 36"),
        (3, 0.05, "There were 3 victims; this limit takes at least 72"),
        (3, 0.0, "not even a million"),
    ],
)
def test_too_few_victims_are_said_and_how_many_it_takes(victims, limit, words) -> None:
    few = estimate(0.0, -0.2, 0.2)
    result = replace(span_text(), victims=victims, difference={"token_top1": few})
    gate = leak("*.*", audit(attacks=(result,)), limit=limit)
    assert gate.status == "inconclusive"
    assert words in gate.detail
    enough = replace(result, victims=72)
    other = leak("*.*", audit(attacks=(enough,)), limit=0.1)
    assert "There were" not in other.detail
    leaking = replace(result, difference={"token_top1": estimate(0.15, 0.0, 0.3)})
    assert "There were" not in leak("*.*", audit(attacks=(leaking,)), limit=0.1).detail


def test_a_claim_that_nobody_tested_is_not_passed() -> None:
    assert judge_claim(bare_audit()).status == "inconclusive"
    assert judge_claim(inconclusive_audit()).status == "inconclusive"
    assert judge_claim(audit(checks=(), dp_trials=(trial(),))).status == "pass"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("line = 1", "expected at least one [[line]], got none"),
        ("", "expected at least one [[line]], got none"),
        ("[[lines]]", "lines: unknown key; did you mean 'line'?"),
        ("[[line]", "expected a TOML file"),
        (
            LEAK.replace("metric", "metrik"),
            "metrik: unknown key; did you mean 'metric'",
        ),
        (LEAK.replace('"replay"', '"both"'), "expected 'this-run' or 'replay'"),
        (LEAK.replace("span_text", "span_txt"), "did you mean 'span_text'?"),
        (LEAK.replace(".token_top1", ""), "expected ATTACK.METRIC or claim.FIELD"),
        (LEAK.replace("0.05", "nan"), "finite number"),
        (LEAK.replace("0.05", "'a'"), "expected a valid number"),
        (LEAK + "\nat_most = 0.5", "expected one of at_most, leak_at_most, equals"),
        (LEAK.partition("leak")[0], "expected one of at_most, leak_at_most, equals"),
        (LEAK + '\ncheck = "*"', "expected either a metric or a check"),
        (LEAK.replace("leak_at_most = 0.05", "equals = 'x'"), "beside an attack"),
        (
            '[[line]]\ncolumn = "replay"\nmetric = "*.*"\nat_most = 0.1',
            "expected leak_at_most beside *.*",
        ),
        (
            CLAIM.format("spent_epsilom"),
            "did you mean 'spent_epsilon'?",
        ),
        (
            '[[line]]\ncolumn = "replay"\nmetric = "claim.delta"\nat_most = 1',
            "expected column = 'this-run'",
        ),
        (
            CLAIM.format("largest_success"),
            "claim.largest_success.N",
        ),
        *(
            (CLAIM.format(name), "claim.largest_success.N")
            for name in (
                "largest_success.\N{SUPERSCRIPT TWO}",
                "largest_success.\N{ARABIC-INDIC DIGIT TWO}",
                "largest_success." + 5000 * "1",
                "largest_success.1.2",
                "spent_epsilon.x",
            )
        ),
        (LEAK.replace("0.05", "true"), "expected a valid number"),
        (LEAK.replace("0.05", "1.5"), "expected a limit of at most 1"),
        (LEAK.replace("span_text.token_top1", "*.*").replace("0.05", "2"), "at most 1"),
        (CLAIM.format("largest_success.10"), "expected a limit of at most 1"),
        (CLAIM.format("noise"), "expected equals beside claim.noise"),
        ('[[line]]\ncolumn = "this-run"\ncheck = ""', "expected check = 'NAME'"),
        (
            '[[line]]\ncolumn = "replay"\ncheck = "*"',
            "expected column = 'this-run' and no limit beside a check",
        ),
    ],
)
def test_a_wrong_policy_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "policy.toml")
    words = str(caught.value)
    assert words.startswith("policy.toml")
    assert message in words
    assert "\n" not in words


def test_a_missing_policy_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="Cannot read the policy"):
        read_policy(tmp_path / "none.toml")


def test_a_pattern_takes_other_signs_as_they_are() -> None:
    assert fits("ledger [a] *", "ledger [a] of 1")
    assert not fits("ledger [a]", "ledger a")
