"""Differential privacy: plan, gradients, noise, accountant, ledger, release."""

from fedpeft.privacy.accountant import Composition, epsilon
from fedpeft.privacy.adopt import Adoption, adopt, verify
from fedpeft.privacy.authorisation import ENROLMENT
from fedpeft.privacy.banded import Banded
from fedpeft.privacy.calibration import calibrate
from fedpeft.privacy.client_level import AdaptiveNorm, PrivateMean
from fedpeft.privacy.engine import SLACK, DpSgd, NonPrivate
from fedpeft.privacy.filter import admits
from fedpeft.privacy.ledger import (
    SEEDED,
    TRUSTED_SERVER,
    Ledger,
    data_sources,
    open_ledger,
)
from fedpeft.privacy.noise_ahead import noise_ahead
from fedpeft.privacy.outbox import Memory, read_memory
from fedpeft.privacy.per_sample import GradientSource
from fedpeft.privacy.plan import Plan, make_plan
from fedpeft.privacy.randomness import (
    Randomness,
    SecureRandomness,
    SeededRandomness,
    poisson_batch,
    sample,
)
from fedpeft.privacy.release import (
    Answer,
    Question,
    Release,
    RequestConflict,
    open_release,
)
from fedpeft.privacy.trade_off import (
    TradeOff,
    gaussian_trade_off,
    reconstruction_bound,
    trade_off,
)

__all__ = [
    "ENROLMENT",
    "SEEDED",
    "SLACK",
    "TRUSTED_SERVER",
    "AdaptiveNorm",
    "Adoption",
    "Answer",
    "Banded",
    "Composition",
    "DpSgd",
    "GradientSource",
    "Ledger",
    "Memory",
    "NonPrivate",
    "Plan",
    "PrivateMean",
    "Question",
    "Randomness",
    "Release",
    "RequestConflict",
    "SecureRandomness",
    "SeededRandomness",
    "TradeOff",
    "admits",
    "adopt",
    "calibrate",
    "data_sources",
    "epsilon",
    "gaussian_trade_off",
    "make_plan",
    "noise_ahead",
    "open_ledger",
    "open_release",
    "poisson_batch",
    "read_memory",
    "reconstruction_bound",
    "sample",
    "trade_off",
    "verify",
]
