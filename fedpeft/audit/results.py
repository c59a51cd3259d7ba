"""What an audit finds, before it is put into words: plain records, all numbers.

Two columns of evidence are never mixed: ``this-run`` is read from the run itself,
``replay`` was measured on the same configuration and code with public data and
canaries.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from fedpeft.attacks.rank_budget import RankBudget
from fedpeft.attacks.threats import ThreatModel

Column = Literal["this-run", "replay"]

COLUMNS: dict[Column, str] = {
    "this-run": "read from this run's own records",
    "replay": "measured on public data, with the same configuration and code",
}


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: the mean.
        low: lower limit.
        high: upper limit.
        method: how the limits were found, such as ``Clopper-Pearson``.
    """

    value: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Slice:
    """What an attack achieved against the victims of one class, by its headline.

    Attributes:
        victims: how many hold records of this class alone.
        found: by the attack.
        control: the same without the client.
    """

    victims: int
    found: Estimate
    control: Estimate


@dataclass(frozen=True)
class Exhibit:
    """One record to look at, beside what was made of it.

    Attributes:
        kind: ``text``, or ``image``: then all three are PNG files in base64.
        truth: the victim's first record.
        guess: what the attack made of the update.
        control: what it made of its control.
        score: of the guess, by the attack's headline.
        control_score: of the control.
    """

    kind: Literal["text", "image"]
    truth: str
    guess: str
    control: str
    score: float
    control_score: float


@dataclass(frozen=True)
class AttackResult:
    """What one attack achieved, beside its controls.

    **Guarantees**: no exhibit of the run's own records; what was reconstructed of them
    is in no report.

    Attributes:
        attack: its id in the menu.
        column: where the observations come from.
        threat: what it was granted.
        units: metric -> ``share``, ``dB``, ``bits`` or ``""``; the first is its
            headline.
        victims: how many clients were attacked.
        records: how many records were guessed at.
        metrics: by name.
        baseline: by name: the best guess without any observation.
        prior_only: by name: the same attack without the client: on another client's
            update, an aggregate without this client's, or another model.
        difference: by name: attack minus prior-only control, paired by victim.
        settings: the attack's hyperparameters, and what was varied.
        seconds: of wall time.
        misfit: why it could not be tried; then there are no metrics. None if it was.
        values: by name: one value a record, in victims' order, 4 decimals.
        control_values: by name: the same of the control.
        by_class: by the name of a class, where each victim holds records of one alone.
        exhibits: of a replay: the best, the middle and the worst guess, best first.

    Raises:
        ValueError: for exhibits of the run itself.
    """

    attack: str
    column: Column
    threat: ThreatModel
    units: dict[str, str]
    victims: int
    records: int
    metrics: dict[str, Estimate]
    baseline: dict[str, Estimate]
    prior_only: dict[str, Estimate]
    difference: dict[str, Estimate]
    settings: dict[str, object]
    seconds: float
    misfit: str | None = None
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    control_values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    by_class: dict[str, Slice] = field(default_factory=dict)
    exhibits: tuple[Exhibit, ...] = ()

    def __post_init__(self) -> None:
        """Keeps what was reconstructed of a run's own records out of reports."""
        if self.exhibits and self.column != "replay":
            raise ValueError(
                f"Expected exhibits of a replay alone, got some of {self.column}: what "
                "is read of a run's own records is never shown."
            )

    def in_short(self) -> "AttackResult":
        """Returns it without what is kept of single records and classes."""
        return replace(self, values={}, control_values={}, by_class={}, exhibits=())


@dataclass(frozen=True)
class BoundResult:
    """One lower bound on epsilon, from canaries.

    Attributes:
        bound: its name, such as ``clopper-pearson`` or ``one-run``.
        epsilon: at least this, with confidence ``1 - alpha``.
        ceiling: the most that so many canaries could ever show.
        alpha: its own, family-wise where several are tested.
        is_estimate: true where the figure is asymptotic, and no bound.
        assumption: what it rests on beside the canaries; empty for nothing.
    """

    bound: str
    epsilon: float
    ceiling: float
    alpha: float
    is_estimate: bool = False
    assumption: str = ""


@dataclass(frozen=True)
class DpTrial:
    """One experiment against the claim: with and without a canary, many times.

    Attributes:
        trial: which one, such as ``spread canary`` or ``empty batch``.
        client: whose round it stands for; None for the code as such.
        server_round: which one; None for a single step or a whole run.
        canaries: scores with the canary, and as many without.
        epsilon_upper: what the accountant claims for what is observed.
        delta: at which.
        bounds: all that were worked out; the one that decides comes first.
        falsified: whether the deciding test refuted the claim.
        detail: one sentence for the report.
    """

    trial: str
    client: int | None
    server_round: int | None
    canaries: int
    epsilon_upper: float
    delta: float
    bounds: tuple[BoundResult, ...]
    falsified: bool
    detail: str


@dataclass(frozen=True)
class Check:
    """A fact about this run that is so or is not; no statistics.

    Attributes:
        check: what was looked at, such as ``ledger of client 3``.
        status: ``ok``, ``failed``, or ``unknown`` where there was nothing to look at.
        detail: what was expected and what was found.
        falsifies: whether a failure refutes the claimed epsilon itself.
    """

    check: str
    status: Literal["ok", "failed", "unknown"]
    detail: str
    falsifies: bool = False


@dataclass(frozen=True)
class Claim:
    """The guarantee as it is claimed; the figures are the run's own.

    Attributes:
        unit: ``example``, ``person`` or ``client``.
        relation: the neighbouring relation.
        target_epsilon: asked for; infinity where only noise was.
        planned_epsilon: of the plan.
        spent_epsilon: of the worst client, over all runs in the ledgers at hand.
        delta: of all three.
        noise_multiplier: of the plan.
        sampling_rate: of a step.
        steps: a round.
        participations: at most, of one client.
        clipping_norm: L2.
        accountant: and its version.
        noise: ``secure`` or ``seeded``.
        holds_against: who may be the adversary.
        largest_success: N -> the most that any adversary with a prior chance
            of 1 / N can reach by this epsilon's trade-off curve, both shares.
    """

    unit: str
    relation: str
    target_epsilon: float
    planned_epsilon: float
    spent_epsilon: float
    delta: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    participations: int
    clipping_norm: float
    accountant: str
    noise: str
    holds_against: str
    largest_success: dict[int, float]


@dataclass(frozen=True)
class Audit:
    """Everything that a report says.

    Attributes:
        run: the run's id; empty for a scenario that is no run of its own.
        created: ISO 8601, UTC.
        config: the resolved configuration, by section; of paths the last part alone.
        config_hash: of the whole of it.
        system: backbone, fingerprint, task, method, numbers of parameters, versions.
        federation: clients, rounds, cohort, optimiser.
        release: clipping, noise, compression, their order, precision.
        claim: the guarantee; None without privacy.
        checks: facts about this run.
        attacks: all that were tried, and those that did not fit.
        dp_trials: experiments against the claim.
        rank_budget: by place.
        surface: attack results over a grid, each with its settings.
        limitations: what was not tested, in sentences.
        provenance: seeds, decoys, machine, wall time.
    """

    run: str
    created: str
    config: dict[str, object]
    config_hash: str
    system: dict[str, object]
    federation: dict[str, object]
    release: dict[str, object]
    claim: Claim | None
    checks: tuple[Check, ...]
    attacks: tuple[AttackResult, ...]
    dp_trials: tuple[DpTrial, ...]
    rank_budget: tuple[RankBudget, ...]
    surface: tuple[AttackResult, ...]
    limitations: tuple[str, ...]
    provenance: dict[str, object]
