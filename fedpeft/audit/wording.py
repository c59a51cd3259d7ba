"""How an audit speaks: numbers rounded to the careful side, ids in plain words."""

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from fedpeft.attacks import ATTACKS as MENU
from fedpeft.attacks.threats import ADVERSARIES, ThreatModel
from fedpeft.audit.results import AttackResult, Claim, Estimate

UNKNOWN = "\N{EN DASH}"
_SPACE = "\N{NO-BREAK SPACE}"

ATTACKS = {
    "rank_budget": "Rank budget",
    "head_leak": "Head leak",
    "span_text": "Span attack on text",
    "span_image": "Span attack on images",
    "gradient_matching": "Gradient matching",
    "update_membership": "Membership from updates",
    "shadow_membership": "Membership from the model",
    "exposure": "Planted strings",
    "malicious_adapter": "Malicious adapter",
}
"""Id -> what a report calls it."""

METRICS = {
    "token_top1": "tokens recovered at the first guess",
    "token_top10": "tokens among the first ten guesses",
    "rouge_l": "longest common part of the text (ROUGE-L)",
    "exact_match": "texts recovered word for word",
    "psnr": "likeness of images (PSNR)",
    "ssim": "likeness of images (SSIM)",
    "identification_top1": "records picked out among decoys",
    "auc": "members told from non-members (AUC)",
    "tpr_at_fpr_1e-2": "members found at 1" + _SPACE + "% false alarms",
    "tpr_at_fpr_1e-3": "members found at 0.1" + _SPACE + "% false alarms",
    "label_accuracy": "labels recovered",
    "feature_cosine": "likeness of features (cosine)",
    "exposure": "exposure of planted strings",
    "exposure_extrapolated": "exposure of planted strings, extrapolated",
    "observable_share": "directions of inputs that lie open",
}
"""Id -> what a report calls it."""

CLAIM = {
    "spent_epsilon": "Epsilon spent by the worst client",
    "planned_epsilon": "Epsilon planned for all rounds",
    "target_epsilon": "Epsilon asked for",
    "delta": "Delta",
    "noise": "The source of the noise",
    "unit": "The unit of privacy",
    "largest_success": "The largest success of an adversary",
}
"""Field of a claim -> what a report calls it, where the field says too little."""

_METRIC_UNITS = {
    metric: unit for attack in MENU.values() for metric, unit in attack.metrics.items()
}

_UNITS = {
    "example": "one example: any single record of a client",
    "person": "one person: all records of theirs at a client",
    "client": "one client: all of its records together",
}

_KNOWS = {
    "A": "knows the model",
    "B": "knows the model and what such data look like in general",
    "C": "knows the model, and how clients train",
    "D": "knows how clients train, and holds public data of the same kind",
    "E": "knows how clients train, and statistics of their data",
}

_ACCESS = {
    "update": "sees one update of a client",
    "updates": "sees a client's updates of several rounds",
    "aggregate": "sees what becomes of a round's updates, and no client's own",
    "final-model": "sees only the released model",
}


def attack_words(attack: str) -> str:
    """Returns an attack's name; an id that is not known stays as it is."""
    return ATTACKS.get(attack, attack)


def result_words(result: AttackResult) -> str:
    """Returns an attack's name, and what it saw where that is no client's update."""
    alone = " (aggregates alone)" if result.threat.access == "aggregate" else ""
    return f"{attack_words(result.attack)}{alone}"


def control_words(result: AttackResult) -> str:
    """Returns what a result's control was given, as a part of a sentence."""
    words = {
        "aggregate": "without this client's update",
        "final-model": "with another model",
    }
    return words.get(result.threat.access, "with another client's update")


def metric_words(metric: str) -> str:
    """Returns a metric's name; an id that is not known stays as it is."""
    return METRICS.get(metric, metric)


def metric_unit(metric: str) -> str:
    """Returns the unit of a metric of the menu."""
    return _METRIC_UNITS.get(metric, "")


def adversary_words(threat: ThreatModel) -> str:
    """Returns a passive adversary as the subject of a sentence.

    >>> adversary_words(ThreatModel("A", "update", "reconstruct"))
    'whoever sees one update of a client, the server included, and knows the model'
    """
    sees, knows = _ACCESS[threat.access], _KNOWS[threat.adversary]
    server = "" if threat.access == "aggregate" else ", the server included"
    return f"whoever {sees}{server}, and {knows}"


def threat_words(threat: ThreatModel) -> str:
    """Returns an adversary in a sentence's part.

    >>> threat_words(ThreatModel("A", "update", "reconstruct"))
    'an eavesdropper, who knows the model; sees one update of a client'
    """
    words = f"{ADVERSARIES[threat.adversary]}; {_ACCESS[threat.access]}"
    if threat.backbone == "unverified":
        words += "; clients do not verify the backbone"
    return words


def unit_words(claim: Claim | None) -> str:
    """Returns who is protected.

    >>> unit_words(None)
    'nobody: the run makes no promise'
    """
    if claim is None:
        return "nobody: the run makes no promise"
    return _UNITS.get(claim.unit, "nobody: the run makes no promise")


def number(value: float) -> str:
    """Returns a number as short as it can be read.

    >>> [number(value) for value in (0.5, 1234.5, 1e-5, float("inf"))]
    ['0.5', '1234', '1e-05', 'unbounded']
    """
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "unbounded"
    return _signed(f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def plain(value: object) -> str:
    """Returns any setting in words.

    >>> plain(None), plain(True), plain(25000), plain({}), plain(0.05)
    ('none', 'yes', '25,000', 'none', '0.05')
    >>> plain({"name": "ternary", "density": 0.2}), plain(["clip", "noise"])
    ('ternary, density 0.2', 'clip, noise')
    """
    if isinstance(value, Mapping):
        parts = [
            plain(part) if key == "name" else f"{key} {plain(part)}"
            for key, part in value.items()
        ]
        return ", ".join(parts) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    r"""Returns a share with two digits, and never as all or nothing if it is not.

    >>> [percent(share) for share in (0.571, 0.0312, 0.000033, 0, 0.9968, 1)]
    ['57\xa0%', '3.1\xa0%', '0.0033\xa0%', '0\xa0%', '99.68\xa0%', '100\xa0%']
    """
    if math.isnan(share):
        return UNKNOWN
    hundredths = 100 * share + 0.0  # no negative zero
    if hundredths and abs(hundredths) < 0.001:
        return f"under 0.001{_SPACE}%"
    if 99 < hundredths < 100:
        text = f"{math.floor(100 * hundredths) / 100:g}"
    else:
        places = 0 if abs(hundredths) >= 9.95 else 1 if abs(hundredths) >= 0.95 else 2
        precise = f"{hundredths:.2g}" if places == 2 else f"{hundredths:.{places}f}"
        text = precise.removesuffix(".0")
    return f"{_signed(text)}{_SPACE}%"


def quantity(value: float, unit: str) -> str:
    r"""Returns a figure with its unit.

    >>> quantity(0.25, "share"), quantity(25.34, "dB"), quantity(0.8123, "")
    ('25\xa0%', '25.3\xa0dB', '0.812')
    """
    if unit == "share":
        return percent(value)
    if math.isnan(value):
        return UNKNOWN
    if unit in ("dB", "bits"):
        text = f"{value:.1f}" if math.isfinite(value) else "unbounded"
        return f"{_signed(text)}{_SPACE}{unit}"
    return number(value)


def interval(estimate: Estimate, unit: str) -> str:
    r"""Returns the limits of a figure.

    >>> interval(Estimate(0.5, 0.4, 0.61, "BCa"), "share")
    '40 to 61\xa0%'
    """
    low, high = quantity(estimate.low, unit), quantity(estimate.high, unit)
    end = high.partition(_SPACE)[2]
    return f"{low.removesuffix(_SPACE + end) if end else low} to {high}"


def upper_epsilon(epsilon: float) -> str:
    """Returns what is at most so much: rounded up.

    >>> [upper_epsilon(value) for value in (7.7312, 8.0, 0.001234, float("inf"))]
    ['7.74', '8', '0.00124', 'unbounded']
    """
    return _rounded(epsilon, ROUND_CEILING)


def lower_epsilon(epsilon: float) -> str:
    """Returns what is at least so much: rounded down.

    >>> [lower_epsilon(value) for value in (3.129, 0.0, 4.0)]
    ['3.12', '0', '4']
    """
    return _rounded(epsilon, ROUND_FLOOR)


def short(text: str, longest: int) -> str:
    """Returns a text's beginning, where it is longer than a page has room for.

    >>> short("abcdef", 4), short("abcd", 4)
    ('abc…', 'abcd')
    """
    return (
        text
        if len(text) <= longest
        else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"
    )


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text


def _rounded(epsilon: float, direction: str) -> str:
    if math.isnan(epsilon):
        return UNKNOWN
    if math.isinf(epsilon):
        return "unbounded"
    exact = Decimal(repr(float(epsilon)))
    places = max(2, 2 - exact.adjusted()) if exact else 0
    text = f"{exact.quantize(Decimal(1).scaleb(-places), direction):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
