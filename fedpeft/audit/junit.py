"""JUnit XML: a policy's lines as test cases, for machines that read nothing else.

What is inconclusive is an error there, not a skipped case: most readers let a skipped
case pass.
"""

import re
from xml.etree import ElementTree

from fedpeft.audit.gates import Gate, Verdict

_NAMES = {"fail": "failure", "inconclusive": "error", "not-claimed": "skipped"}
_COUNTED = {"failures": "fail", "errors": "inconclusive", "skipped": "not-claimed"}
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(verdict: Verdict, seconds: float = 0.0) -> bytes:
    """Returns the file: one case for the claim, and one a line of the policy.

    Args:
        verdict: what was judged.
        seconds: that the audit took.
    """
    gates = verdict.gates
    suite = ElementTree.Element("testsuite", name="fedpeft audit")
    suite.set("tests", str(len(gates)))
    suite.set("time", f"{seconds:.1f}")
    for name, status in _COUNTED.items():
        suite.set(name, str(sum(gate.status == status for gate in gates)))
    for gate in gates:
        suite.append(_case(gate))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, "utf-8", xml_declaration=True)) + b"\n"


def _case(gate: Gate) -> ElementTree.Element:
    kind = "audit.claim" if gate.column == "both" else f"audit.{gate.column}"
    case = ElementTree.Element("testcase", classname=kind, name=_legal(gate.rule))
    if gate.status in _NAMES:
        message = _legal(gate.detail)
        ElementTree.SubElement(
            case, _NAMES[gate.status], message=message, type=gate.status
        )
    else:
        ElementTree.SubElement(case, "system-out").text = _legal(gate.detail)
    return case


def _legal(text: str) -> str:
    """Replaces what XML 1.0 cannot hold, such as most control characters."""
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
