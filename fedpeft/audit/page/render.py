"""``report.html``: the whole report as one file that asks for nothing from elsewhere.

Its first page stands alone and is for whoever answers for the data. The templates lie
in ``templates/``; what takes more than a look at the audit is worked out here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedpeft.attacks.threats import ADVERSARIES
from fedpeft.audit import wording
from fedpeft.audit.findings import findings
from fedpeft.audit.gates import Verdict
from fedpeft.audit.page.attack_figures import attack_pictures
from fedpeft.audit.page.crosswalk import GLOSSARY, ROWS
from fedpeft.audit.page.epsilon_figures import epsilon_picture, rounds_picture
from fedpeft.audit.page.first_page import first_page
from fedpeft.audit.page.gallery import marked, walls
from fedpeft.audit.page.heat_maps import surface_pictures
from fedpeft.audit.page.roc_figures import roc_pictures
from fedpeft.audit.page.spread_figures import class_tables, spread_pictures
from fedpeft.audit.results import COLUMNS, AttackResult, Audit

_SHORT_TAGS = {"this-run": "This run", "replay": "Replay"}


def render(audit: Audit, verdict: Verdict, *, document_hash: str, signed: bool) -> str:
    """Returns the page. All text of the audit's is escaped.

    **Guarantees**: no script, no request. No record of the run's own clients: what is
    to be seen of records are the exhibits of a replay, which are public.

    Args:
        audit: what was found.
        verdict: the policy held against it.
        document_hash: sha256 of the ``report.json`` that lies beside.
        signed: whether a ``report.sig`` lies beside.
    """
    tried = [each for each in audit.attacks if each.misfit is None]
    return _ENVIRONMENT.get_template("page.html.j2").render(
        audit=audit,
        claim=audit.claim,
        verdict=verdict,
        first=first_page(audit, verdict),
        findings=findings(audit, verdict),
        epsilon=epsilon_picture(audit.claim, audit.dp_trials),
        attacks=attack_pictures(tried),
        walls=walls(tried),
        spreads=spread_pictures(tried),
        classes=class_tables(tried),
        curves=roc_pictures(tried, _non_members(audit)),
        misfits=[each for each in audit.attacks if each.misfit is not None],
        surface=surface_pictures(audit.surface),
        rounds=rounds_picture(audit.dp_trials),
        trials=[each for each in audit.dp_trials if each.server_round is None],
        threats=_threats(audit.attacks),
        flow=flow(audit.release.get("order")),
        columns=COLUMNS,
        crosswalk=ROWS,
        glossary=GLOSSARY,
        document_hash=document_hash,
        signed=signed,
    )


def _non_members(audit: Audit) -> int | None:
    """Returns of how many each client's members were told apart; None if not known."""
    section = audit.config.get("audit")
    asked = section.get("non_members") if isinstance(section, Mapping) else None
    counts = [asked, audit.provenance.get("decoys")]
    known = [count for count in counts if isinstance(count, int)]
    return min(known) if isinstance(asked, int) else None


def _threats(results: tuple[AttackResult, ...]) -> list[tuple[str, str, str, str]]:
    """Returns letter, description, goal and attacks of each threat model."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for each in results:
        threat = each.threat
        key = (threat.adversary, wording.threat_words(threat), threat.goal)
        name = wording.result_words(each)
        names = found.setdefault(key, [])
        if name not in names:
            names.append(name)
    return [(*key, ", ".join(names)) for key, names in sorted(found.items())]


@dataclass(frozen=True)
class Stage:
    """One stage of the data's way; `seen` where an adversary may look."""

    name: str
    words: str = ""
    seen: bool = False


def flow(order: object) -> list[Stage]:
    """Returns the way of the data; a client's steps end where the server's begin.

    >>> [stage.name for stage in flow(["compress", "decompress", "noise"])[2:]]
    ['Compress', 'The update', 'Decompress', 'Noise', 'The mean', 'The model']
    """
    steps = [str(step) for step in order] if isinstance(order, list | tuple) else []
    end = steps.index("decompress") if "decompress" in steps else len(steps)
    stages = [Stage(step.capitalize()) for step in steps]
    return [
        Stage("A client's records", "stay where they are"),
        Stage("Gradients", "of adapters and head; the backbone is frozen"),
        *stages[:end],
        Stage("The update", "on the wire: here an adversary looks", seen=True),
        *stages[end:],
        Stage("The mean", "of a round's updates: all see the next model", seen=True),
        Stage("The model", "is released", seen=True),
    ]


def facts(table: Mapping[str, object]) -> list[tuple[str, str]]:
    """Returns a table's keys and values in words.

    >>> facts({"batch_size": 8, "order": ["clip", "noise"], "options": {"rank": 8}})
    [('Batch size', '8'), ('Order', 'clip, noise'), ('Options', 'rank 8')]
    """
    return [(_label(key), wording.plain(value)) for key, value in table.items()]


def _label(key: str) -> str:
    return key[:1].upper() + key[1:].replace("_", " ")


def _moment(text: str) -> str:
    """Returns ISO 8601 as a person writes it; other text as it is."""
    try:
        return f"{datetime.fromisoformat(text):%-d %B %Y, %H:%M} UTC"
    except ValueError:
        return text


def _style() -> Markup:
    text = (
        files("fedpeft.audit.page")
        .joinpath("templates", "style.css")
        .read_text("utf-8")
    )
    return Markup(text)


_ENVIRONMENT = Environment(
    autoescape=True,
    loader=PackageLoader("fedpeft.audit.page", "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_GLOBALS: dict[str, Any] = {
    "adversaries": ADVERSARIES,
    "facts": facts,
    "marked": marked,
    "plain": wording.plain,
    "style": _style,
    "tags": _SHORT_TAGS,
    "wording": wording,
}
_ENVIRONMENT.globals.update(_GLOBALS)
_ENVIRONMENT.filters.update(
    moment=_moment,
    percent=wording.percent,
    at_most=wording.upper_epsilon,
    at_least=wording.lower_epsilon,
    short=wording.short,
    svg=Markup,
)
