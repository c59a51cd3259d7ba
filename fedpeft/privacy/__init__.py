"""Differential privacy: plan, gradients, noise, accountant, ledger, release."""

from fedpeft.privacy.accountant import Composition, epsilon
from fedpeft.privacy.adopt import Adoption, adopt, verify
from fedpeft.privacy.calibration import calibrate
from fedpeft.privacy.engine import SLACK, DpSgd, NonPrivate
from fedpeft.privacy.ledger import SEEDED, Ledger, data_sources, open_ledger
from fedpeft.privacy.plan import Plan, make_plan
from fedpeft.privacy.randomness import (
    Randomness,
    SecureRandomness,
    SeededRandomness,
)
from fedpeft.privacy.release import (
    Answer,
    Question,
    Release,
    RequestConflict,
    open_release,
)

__all__ = [
    "SEEDED",
    "SLACK",
    "Adoption",
    "Answer",
    "Composition",
    "DpSgd",
    "Ledger",
    "NonPrivate",
    "Plan",
    "Question",
    "Randomness",
    "Release",
    "RequestConflict",
    "SecureRandomness",
    "SeededRandomness",
    "adopt",
    "calibrate",
    "data_sources",
    "epsilon",
    "make_plan",
    "open_ledger",
    "open_release",
    "verify",
]
