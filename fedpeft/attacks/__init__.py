"""Attacks: what an adversary does with an observation. One a file; this is the menu."""

from typing import Any

from fedpeft.attacks.attack import Attack
from fedpeft.attacks.exposure import Exposure
from fedpeft.attacks.gradient_matching import GradientMatching
from fedpeft.attacks.head_leak import HeadLeak
from fedpeft.attacks.malicious_adapter import MaliciousAdapter
from fedpeft.attacks.rank_budget import ObservedRank
from fedpeft.attacks.shadow_membership import ShadowMembership
from fedpeft.attacks.span_image import SpanImage
from fedpeft.attacks.span_text import SpanText
from fedpeft.attacks.update_membership import UpdateMembership

ATTACKS: dict[str, type[Attack[Any]]] = {
    "rank_budget": ObservedRank,
    "head_leak": HeadLeak,
    "span_text": SpanText,
    "span_image": SpanImage,
    "gradient_matching": GradientMatching,
    "update_membership": UpdateMembership,
    "shadow_membership": ShadowMembership,
    "exposure": Exposure,
    "malicious_adapter": MaliciousAdapter,
}
"""id -> class, a frozen dataclass of hyperparameters."""
