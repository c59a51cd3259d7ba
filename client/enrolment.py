"""Between a server's proposal and the first answer: limits, consent, the same model."""

from collections.abc import Callable
from pathlib import Path

from client.agreement import AcceptedPlans, Proposal, check_limits
from client.settings import (
    ClientSection,
    LimitsSection,
    OwnDataSection,
)
from client.site import Site
from client.terms import Terms, terms
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, RunError
from fedpeft.menus import check_variants

Show = Callable[[Terms, str], None]
"""Shows the operator the terms of a plan and its hash."""


class NotAccepted(RunError):
    """A plan that the operator has not accepted, and was shown."""


def check_proposal(proposal: Proposal, index: int, limits: LimitsSection) -> None:
    """Refuses a proposal that is none, or is beyond the client's limits.

    Raises:
        ConfigError: if it makes no sense.
        RunError: names the limit.
    """
    check_variants(proposal.config)
    clients = proposal.config.partition.num_clients
    if not 0 <= index < clients:
        raise ConfigError(f"Expected an index below {clients}, got {index}.")
    check_limits(proposal, limits)


def check_consent(
    proposal: Proposal, section: ClientSection, accept: str | None, show: Show
) -> None:
    """Finds the operator's consent to this very plan, or asks for it.

    Consent is in the state directory, or given by `accept` or by the settings, and then
    written down. One that is given speaks of one plan alone: with it, no other is taken
    from the state directory.

    **Guarantees**: no plan is accepted whose terms were not shown.

    Args:
        proposal: what is to be consented to.
        section: the client's own.
        accept: hash of a plan, as the command line gives it.
        show: called unless the plan was accepted before.

    Raises:
        NotAccepted: the plan was shown.
    """
    plans = AcceptedPlans(section.state)
    chosen = accept or section.accept
    if chosen in (None, proposal.hash) and plans.holds(proposal.hash):
        return
    rows = terms(proposal, plans.largest_budget())
    show(rows, proposal.hash)
    if chosen == proposal.hash:
        plans.accept(proposal, rows)
        return
    if chosen is None:
        raise NotAccepted(
            "Expected an accepted plan: read it above, then start once with --accept "
            f"{proposal.hash}."
        )
    place = "--accept" if accept else "[client] accept"
    raise NotAccepted(
        f"Expected the plan {chosen} ({place}), the server proposes {proposal.hash}: "
        "read it above, and accept that one if you agree to it."
    )


def check_site(site: Site, proposal: Proposal, state: Path) -> None:
    """Refuses another backbone than the server's, and the memory of other records.

    Raises:
        RunError: names the two backbones.
        LedgerError: names the other records.
    """
    site.check_state(state)
    if site.model.fingerprint != proposal.backbone:
        name = proposal.config.model.backbone
        raise RunError(
            f"Expected the server's backbone {name} ({proposal.backbone[:16]}), this "
            f"site's is another one ({site.model.fingerprint[:16]}): bring the same "
            "files to both."
        )


def own_data(section: OwnDataSection) -> str:
    """Returns the text by which ``open_site`` knows a client's records."""
    return section.model_dump_json(exclude_none=True)


def needed_assets(config: RunConfig, own: OwnDataSection) -> list[str]:
    """Returns the backbone, and the data set where a share of it is trained on."""
    shared = config.data.name if own.path is None else None
    return [name for name in (config.model.backbone, shared) if name]
