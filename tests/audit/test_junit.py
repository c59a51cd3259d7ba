"""JUnit XML: one case for the claim, and one a line of the policy."""

from xml.etree import ElementTree

import pytest

from fedpeft.audit.gates import judge_policy
from fedpeft.audit.junit import to_junit
from fedpeft.audit.policy import default_policy
from fedpeft.audit.results import Check
from tests.audit.examples import ALL, audit, claim


def suite(name: str) -> ElementTree.Element:
    verdict = judge_policy(default_policy(), ALL[name]())
    found = ElementTree.fromstring(to_junit(verdict, 12.3)).find("testsuite")
    assert found is not None
    return found


@pytest.mark.parametrize("name", ALL)
def test_there_is_one_case_for_the_claim_and_one_a_line(name: str) -> None:
    cases = suite(name).findall("testcase")
    kinds = [case.get("classname") for case in cases]
    assert kinds == ["audit.claim", *4 * ["audit.this-run"], "audit.replay"]
    assert suite(name).get("tests") == "6"
    for tag, count in (("failure", "failures"), ("error", "errors")):
        found = [case for case in cases if case.find(tag) is not None]
        assert suite(name).get(count) == str(len(found))


def test_a_pass_is_clean() -> None:
    assert (suite("usual").get("failures"), suite("usual").get("errors")) == ("0", "0")


def test_what_is_inconclusive_is_an_error_and_never_skipped() -> None:
    found = suite("inconclusive")
    assert int(found.get("errors", 0)) >= 2
    assert found.get("skipped") == "0"


def test_a_refuted_claim_is_a_failure_that_says_why() -> None:
    failure = suite("falsified").find("testcase/failure")
    assert failure is not None
    assert "2,000 of 2,000 answers" in failure.get("message", "")


def test_a_run_that_claims_nothing_skips_the_claim() -> None:
    first = suite("open").find("testcase")
    assert first is not None
    assert first.find("skipped") is not None


def test_signs_that_xml_cannot_hold_are_replaced() -> None:
    odd = Check("ledger", "failed", "Found \x00\x1b & <none> in 5\xa0%.")
    verdict = judge_policy(default_policy(), audit(claim=claim(), checks=(odd,)))
    text = to_junit(verdict).decode()
    ElementTree.fromstring(text)
    assert "Found \ufffd\ufffd &amp; &lt;none&gt; in 5\xa0%." in text
