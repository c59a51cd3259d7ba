"""What a plan means, in words, for the person who answers for the data."""

from client.agreement import Proposal, budget_in_force
from fedpeft.config import RunConfig
from fedpeft.privacy import Plan
from fedpeft.wording import printable

Terms = list[tuple[str, str]]
"""Rows of a name and a value, each a single printable line."""

_UNITS = {
    "example": "one example: a single row of the data",
    "person": "one person: all rows that share a value of the person column",
    "client": "one client: all of its records together",
}
_RELATIONS = {
    "add-or-remove-one": "data with it and without it can hardly be told apart",
    "replace-one": "data with another one in its place can hardly be told apart",
}
_SEEDED = (
    "SEEDED: whoever knows the seed, the server too, can remove the noise. These data "
    "would be as good as unprotected, for ever. For tests and rehearsals only"
)

_OF_THE_BACKBONE = {
    "full": "linear and normalisation layers",
    "bias": "biases of its linear and normalisation layers",
}
"""What of the backbone itself a method trains."""

_LONGEST = 500
"""Letters of a value: a server must not push the other rows out of sight."""


def terms(proposal: Proposal, earlier: tuple[float, float] | None = None) -> Terms:
    """Says what would be agreed to.

    **Guarantees**: every value is one line of printable characters, whatever the server
    wrote into its configuration: it can neither add a row nor move the cursor.

    Args:
        proposal: as received.
        earlier: the largest budget (epsilon over all runs, delta) accepted so far.

    Raises:
        ConfigError: if the configuration is none, or has no plan.
    """
    config, plan = proposal.config, proposal.plan
    rows = _none() if plan is None else _promise(config, plan, earlier)
    rows += [
        ("task", _task(config)),
        ("trained", _trained(config)),
        ("scenario's data", _data(config)),
        _learned(config),
        ("backbone", f"{config.model.backbone}, fingerprint {proposal.backbone}"),
        ("leaves this site", _leaving(config)),
        ("stays here", _staying(config)),
        ("kept for an auditor", _recorded(config)),
        ("hash of all this", proposal.hash),
    ]
    return [(name, printable(value, _LONGEST)) for name, value in rows]


def _none() -> Terms:
    warning = (
        "NOTHING. This run promises no privacy: its updates may tell any record, and "
        "after it no private run can promise anything for these data"
    )
    return [("protects", warning), ("epsilon", "infinite")]


def _promise(
    config: RunConfig, plan: Plan, earlier: tuple[float, float] | None
) -> Terms:
    most = plan.max_participations
    return [
        ("protects", f"{_UNITS[plan.unit]} (unit {plan.unit})"),
        ("relation", f"{plan.relation}: {_RELATIONS[plan.relation]}"),
        (
            "epsilon",
            f"{plan.planned_epsilon:.4f} planned, {plan.target_epsilon:g} at most",
        ),
        ("delta", f"{plan.target_delta:g}"),
        ("budget over all runs", _budget(config, earlier)),
        ("holds against", _against(plan)),
        (
            "rounds",
            f"{config.run.rounds} a run, {most} of them with this client at most; "
            "further runs of the same plan until the budget is spent",
        ),
        ("noised steps a round", str(plan.local_steps)),
        ("noise multiplier", f"{plan.noise_multiplier:.4f}"),
        ("clipping norm", f"{plan.clipping_norm:g}"),
        ("sampling rate", f"{plan.sampling_rate:.4g} ({plan.sampling})"),
        ("noise", _noise(config, plan)),
    ]


def _budget(config: RunConfig, earlier: tuple[float, float] | None) -> str:
    epsilon, delta = budget_in_force(config, None), config.privacy.target_delta
    text = f"epsilon {epsilon:g}, for everything in this client's ledger"
    if earlier is None:
        return text
    if epsilon > earlier[0]:
        text += f". RAISES the budget over all runs from {earlier[0]:g} to {epsilon:g}"
    if delta > earlier[1]:
        text += f". RAISES delta from {earlier[1]:g} to {delta:g}"
    return text


def _against(plan: Plan) -> str:
    if plan.is_dp_sgd:
        return "everybody, the server too"
    return "everybody but the server, which sees this client's updates unprotected"


def _noise(config: RunConfig, plan: Plan) -> str:
    if config.privacy.noise == "seeded":
        return _SEEDED
    if plan.is_dp_sgd:
        return "secure: added here, from a cryptographic generator"
    return "added by the server, which this client must trust: it cannot verify it"


def _data(config: RunConfig) -> str:
    named = config.data.name or config.data.path
    return f"{named}; a client that trains on a share reads it, others their own file"


def _task(config: RunConfig) -> str:
    task = config.model.task
    if task != "image-classification":
        return f"{task}, of {config.data.max_length} tokens at most"
    size = config.data.image_size
    pixels = "the backbone's own size" if size is None else f"{size} x {size} pixels"
    return f"{task}, of images scaled to {pixels}"


def _learned(config: RunConfig) -> tuple[str, str]:
    """Names what is told from what."""
    data = config.data
    if config.model.task != "causal-lm":
        return ("labels", ", ".join(data.labels or ("those of the data set",)))
    if data.completion is None:
        return ("prompts and completions", "those of the data set")
    columns = f"the columns {data.prompt} and {data.completion}"
    return ("prompts and completions", columns)


def _trained(config: RunConfig) -> str:
    options = ", ".join(f"{k} = {v}" for k, v in config.peft.options.items())
    method = f"{config.peft.name} ({options})" if options else config.peft.name
    head = "" if config.model.task == "causal-lm" else " and the task's head"
    own = _OF_THE_BACKBONE.get(config.peft.name)
    if own is not None:
        return f"{method}: the backbone's own {own}{head}"
    return f"the adapter {method}{head}; the backbone stays as it is"


def _leaving(config: RunConfig) -> str:
    share = config.peft.share
    part = "" if share is None else f" of the tensors named {' or '.join(share)} alone"
    update = f"one update a round{part}, compressed by {config.compression.name}"
    if config.is_private:
        return (
            f"{update}, or a code from a fixed list that says why there is none; how "
            "many releases the ledger holds, and its newest hash"
        )
    return f"{update}, or a code from a fixed list; the number of examples"


def _recorded(config: RunConfig) -> str:
    if not config.audit.record:
        return "nothing"
    return (
        "every answer of this site, as it comes to the server: the update, and what "
        "stands in the ledger's head beside it; encrypted for the owner of the key "
        f"{config.audit.auditor}"
    )


def _staying(config: RunConfig) -> str:
    kept = "the data, losses, the ledger's entries"
    if config.is_private:
        kept = f"{kept}, the number of examples"
    if config.peft.share is None:
        return kept
    how = "without noise" if not config.is_dp_sgd else "with the same noise"
    return f"{kept}; all other tensors that are trained: {how}, for this run alone"
