"""What the report says, and what it never says."""

import re
from dataclasses import replace
from functools import cache
from html import escape

import pytest

from fedpeft.attacks import ATTACKS
from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.findings import MOST, findings
from fedpeft.audit.gates import judge_policy
from fedpeft.audit.page.drawing import canvas, to_svg
from fedpeft.audit.page.first_page import odds
from fedpeft.audit.page.heat_maps import surface_pictures
from fedpeft.audit.page.render import render
from fedpeft.audit.policy import default_policy
from fedpeft.audit.results import Audit
from fedpeft.audit.wording import attack_words, metric_unit, metric_words
from tests.audit.examples import (
    ALL,
    attack,
    audit,
    bare_audit,
    claim,
    estimate,
    falsified_audit,
    open_audit,
    seeded_audit,
    span_text,
    surface,
)


def page(found: Audit, *, signed: bool = False) -> str:
    verdict = judge_policy(default_policy(), found)
    return render(found, verdict, document_hash=64 * "a", signed=signed)


@cache
def named(name: str) -> str:
    return page(ALL[name]())


def text(found: Audit) -> str:
    """The page's words, without tags and line ends."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page(found)).split())


def said(found: Audit) -> list[str]:
    verdict = judge_policy(default_policy(), found)
    return [f"{each.text} {each.advice}" for each in findings(found, verdict)]


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_of_the_menu_has_words_and_units(attack: str) -> None:
    assert attack_words(attack) != attack
    for metric, unit in ATTACKS[attack].metrics.items():
        assert metric_words(metric) != metric
        assert metric_unit(metric) == unit


@pytest.mark.parametrize("name", ALL)
def test_no_page_calls_anything_by_words_that_promise_too_much(name: str) -> None:
    whole = named(name).lower()
    assert "safe" not in whole
    assert "anonym" not in whole


@pytest.mark.parametrize("name", ALL)
def test_a_page_needs_no_script_and_nothing_from_elsewhere(name: str) -> None:
    whole = named(name)
    assert "<script" not in whole
    assert not re.search(r"""(src|href)="(?!data:|#)""", whole)
    assert "@import" not in whole
    assert not re.search(r"url\((?!#)", whole)


@pytest.mark.parametrize("name", ALL)
def test_equal_audits_give_equal_pages(name: str) -> None:
    assert page(ALL[name]()) == named(name)


def test_words_and_labels_of_a_picture_are_taken_as_they_are() -> None:
    signs = r"\1 \g<0> \q & $x^2$ $\frac$"
    with canvas(1.0) as (figure, axes):
        axes.text(0, 0, signs)
        axes.set_xlabel("$x$", loc="right")
        svg = to_svg(figure, r"a\1", signs)
    assert f'aria-label="{escape(signs)}"' in svg
    assert svg.count(escape(signs)) >= 2
    assert "$x$</text>" in svg
    assert r'id="a\1-' in svg


def test_what_an_audit_quotes_is_escaped() -> None:
    whole = named("extreme")
    assert "<b>one</b>" not in whole
    assert "Expected &lt;b&gt;one&lt;/b&gt;, found two." in whole


def test_the_first_page_says_the_odds_in_one_sentence() -> None:
    assert (
        "An attacker who must pick your record among 1,000 succeeds at most 31 % "
        "This run by this run alone, measured 0.4 % (0 to 3.4 %) Replay , guessing "
        "0.1 %."
    ) in text(audit()).replace("\N{NO-BREAK SPACE}", " ")


def test_what_earlier_runs_spent_comes_on_top_of_the_odds() -> None:
    on_top = "other runs on the same data come on top"
    assert on_top in text(audit(claim=claim(spent_epsilon=7.94)))
    assert on_top not in text(audit())


def test_a_bound_stands_beside_no_attack_that_it_does_not_cover() -> None:
    read = attack(
        "head_leak",
        {"identification_top1": ("share", 1.0, 0.001, 0.001)},
        ThreatModel("A", "update", "identify"),
    )
    trusting = claim(unit="client", holds_against="everybody but the server")
    found = audit(claim=trusting, attacks=(read,))
    assert odds(found).measured is None
    assert "not measured by any attack that this bound covers" in text(found)
    advice = "Unit 'client' trusts the server; [privacy] unit = 'example' or 'person'"
    assert any(advice in each for each in said(found))
    assert not any("Lower target_epsilon" in each for each in said(found))
    public = replace(read, threat=ThreatModel("A", "aggregate", "identify"))
    assert odds(replace(found, attacks=(read, public))).measured is not None
    assert odds(audit(attacks=(read,))).measured is not None


def test_what_saw_aggregates_alone_is_told_from_what_saw_updates() -> None:
    rates = {"auc": ("share", 0.9, 0.6, 0.5)}
    shown, together, released = (
        attack("update_membership", rates, ThreatModel("A", access, "membership"))
        for access in ("updates", "aggregate", "final-model")
    )
    found = audit(attacks=(shown, together, released))
    name = "Membership from updates"
    sentences = [each for each in said(found) if each.startswith(name)]
    control = ["with another client's update", "without this client's", "another model"]
    assert len(sentences) == 3
    for words in control:
        assert sum(words in each for each in sentences) == 1
    assert sum("(aggregates alone)" in each for each in sentences) == 1
    assert f"{name} (aggregates alone)" in text(found)
    gate = judge_policy(default_policy(), audit(attacks=(together,))).lines
    assert any("(aggregates alone)" in each.detail for each in gate)


def test_a_surface_draws_updates_and_aggregates_apart() -> None:
    cells = surface()
    together = tuple(
        replace(cell, threat=replace(cell.threat, access="aggregate")) for cell in cells
    )
    apart = [picture.name for picture in surface_pictures((*cells, *together))]
    assert len(apart) == 2 * len(surface_pictures(cells))
    assert len(set(apart)) == len(apart)


def test_the_odds_are_among_as_many_as_were_measured() -> None:
    name = "identification_top1"
    ten = attack("head_leak", {name: ("share", 0.2, 0.1, 0.1)})
    exact = replace(ten, baseline={name: estimate(0.1, 0.1, 0.1)})
    found = odds(audit(attacks=(exact,), provenance={}))
    assert (found.among, found.theory) == (10, "91\N{NO-BREAK SPACE}%")
    rough = odds(audit(attacks=(ten,), provenance={}))
    assert rough.among == 1000
    asked = odds(audit(attacks=(ten,), provenance={}, config={"audit": {"decoys": 9}}))
    assert asked.among == 10
    more = odds(audit(attacks=(ten,), provenance={"decoys": 5000}))
    assert (more.among, more.theory) == (5001, "31\N{NO-BREAK SPACE}%")
    unmeasured = odds(audit(attacks=()))
    assert (unmeasured.among, unmeasured.measured) == (1000, None)
    assert odds(open_audit()).theory is None


def test_the_odds_are_those_of_whom_the_claim_protects() -> None:
    assert odds(audit()).mine == "your record"
    assert odds(audit(claim=claim(unit="client"))).mine == "your client"


def test_a_run_without_privacy_is_told_so_first() -> None:
    first, *others = said(open_audit())
    assert "nothing bounds what updates reveal" in first
    assert "No privacy guarantee is claimed." in text(open_audit())
    (span,) = (each for each in others if each.startswith("Span attack on text"))
    assert "with another client's update 3.1" in span
    assert "With epsilon 8 it reached 3.3" in span


def test_a_refuted_claim_comes_before_everything_else() -> None:
    first, *_ = said(falsified_audit())
    assert first.startswith("The claim is refuted by the trial 'empty batch'")
    assert "The claimed privacy guarantee is refuted." in text(falsified_audit())


def test_seeded_noise_is_marked_red_wherever_it_is_named() -> None:
    whole = page(seeded_audit())
    assert '<dd class="red" id="noise">seeded' in whole
    assert '<strong class="red">seeded' in whole
    assert any("seed" in each for each in said(seeded_audit()))
    assert '<strong class="red">' not in page(audit())


@pytest.mark.parametrize("name", ["usual", "open", "falsified", "seeded", "extreme"])
def test_there_are_three_to_five_findings(name: str) -> None:
    assert 3 <= len(said(ALL[name]())) <= MOST


def test_a_leak_is_never_called_absent() -> None:
    alone = said(audit(attacks=(span_text(0.03),)))
    assert any(each.startswith("The one attack tried did no better") for each in alone)
    (quiet,) = (each for each in said(audit()) if each.startswith("None of"))
    assert quiet.startswith("None of the 4 attacks tried did better than its")
    assert "95 % upper limit 4" in quiet


def test_an_overspent_budget_is_found() -> None:
    spent = audit(claim=claim(spent_epsilon=8.5))
    assert any("8.5 of 8: more than its target" in each for each in said(spent))


def test_every_line_of_evidence_bears_its_column() -> None:
    whole = page(audit())
    first = whole[: whole.index("<main>")]
    rows = re.findall(r"<tr><td>.*?</tr>", first, re.DOTALL)
    assert len(rows) == 6
    assert all('class="tag ' in row for row in rows)
    assert all('class="tag ' in each for each in re.findall(r"<figcaption>.*", whole))


def test_an_empty_audit_says_what_it_does_not_know() -> None:
    words = text(bare_audit())
    assert "none: no attack was run" in words.lower()
    assert "No reconstruction was tried." in words
    assert "Nothing was tried against it." in words


def test_a_signed_page_says_how_to_check_it_and_others_that_nobody_vouches() -> None:
    assert "fedpeft audit verify" in page(audit(), signed=True)
    assert "Unsigned: nobody vouches for this file." in page(audit())


def test_a_surface_has_a_map_for_each_choice_of_the_other_settings() -> None:
    one, five = surface_pictures(surface())
    assert "local steps 1" in one.takeaway
    assert "local steps 5" in five.takeaway
    assert "up to 88\N{NO-BREAK SPACE}% above control" in one.takeaway
    assert "6 of 9 cells are at control" in one.takeaway
    assert [row[:2] for row in one.table.rows[:3]] == [
        ("head", "8"),
        ("head", "64"),
        ("head", "unbounded"),
    ]


def test_a_grid_of_one_setting_is_one_row_and_misfits_are_left_out() -> None:
    cells = [span_text(0.9, rank=4), span_text(0.95, rank=8)]
    broken = replace(cells[0], metrics={}, misfit="no factor reads the first block")
    (only,) = surface_pictures([*cells, broken])
    assert [row[0] for row in only.table.rows] == ["4", "8"]
