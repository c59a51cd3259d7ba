"""Before training: does the state that a server sends look made to catch records?

Only what does not depend on data is looked at, so that a refusal tells nothing of them.
"""

from client.messages import TrainRequest
from client.site import Site
from fedpeft.attacks.detector import inspect
from fedpeft.attacks.rank_budget import rank_budget
from fedpeft.compression import COMPRESSORS
from fedpeft.interfaces import Payload

_REFUSED = ("not-finite", "same-rows", "ladder")
"""What no honest training makes. Values that merely moved far may have reasons."""

_HEAD = "head."
"""Rows of a head that has seen one class are alike by right."""


def suspicion(site: Site, request: TrainRequest) -> str | None:
    """Says what is wrong with a state; None if nothing is.

    **Guarantees**: depends on the request and the configuration alone.

    Raises:
        InvalidPayload: if it is no state of this model.
    """
    payload = Payload.from_bytes(request.state)
    state = COMPRESSORS["dense"]().decompress(payload, site.start)
    adapters = {n: t for n, t in state.items() if not n.startswith(_HEAD)}
    start = {name: site.start[name] for name in adapters}
    noise = site.plan.noise_multiplier if site.plan else 0.0
    found = inspect(adapters, start, site.config, request.server_round, noise)
    reasons = [f"{f.tensor}: {f.detail}" for f in found if f.kind in _REFUSED]
    if not reasons:
        return None
    return f"the server's state looks crafted to single records out: {reasons[0]}"


def exposure(site: Site) -> str:
    """Says what arithmetic alone tells of how far a client's inputs are exposed."""
    budgets = rank_budget(site.model, site.config)
    if not budgets:
        return "no trained matrix reads the inputs of the first trained block"
    first = budgets[0]
    if site.plan is not None and site.plan.is_dp_sgd:
        return f"{first.verdict} without noise, which this plan adds: {first.detail}"
    return f"{first.verdict}: {first.detail}"
