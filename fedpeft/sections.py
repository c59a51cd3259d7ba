"""The sections of the configuration file: one frozen class a table.

An unknown key is an error. A section that chooses a variant (``[peft]``,
``[compression]``, ...) is a :class:`Component`: the variant's own hyperparameters stand
beside its name. What sections must say of each other is checked by ``RunConfig``.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Component(Section):
    """A table that chooses a variant by name; further keys are the variant's fields."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The variant's hyperparameters, not yet checked."""
        return dict(self.model_extra or {})


class RunSection(Section):
    """``[run]``: how long, from which seed, where.

    Attributes:
        state: directory of the clients' ledgers; None puts it in the run directory.
        workers: client processes of one thread each; 0 runs all in this process.
        evaluate_every: rounds between two evaluations; the last round always has one.
        evaluate_on: ``validation`` while hyperparameters are chosen, so that the test
            split stays unseen; it needs a ``[data] validation_fraction``.
        average_last: the final model is the mean of the states of the last k rounds.
        id: names the run in ledgers and messages; drawn when the run starts.
    """

    rounds: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    state: str | None = None
    workers: int = Field(default=2, ge=0)
    evaluate_every: int = Field(default=1, ge=1)
    evaluate_on: Literal["test", "validation"] = "test"
    average_last: int = Field(default=1, ge=1)
    id: str | None = None


class DataSection(Section):
    """``[data]``: a data set by `name`, or the user's own file by `path`.

    Attributes:
        nominal_examples: a public constant a client, for unit ``example``; with the
            batch size it gives the sampling rate. The exact number of a client's
            examples is never used under privacy.
        labels: the classes, declared; they are never read from the data.
        group: the column by which data are split and partitioned (a site, a film).
        person: the column that names whose record a row is; needed for unit ``person``,
            and whenever it is given a person's rows stay together.
        nominal_persons: the public constant a client for unit ``person``, in place of
            `nominal_examples`.
        multi_label: an example may have several labels or none: a list in jsonl and
            parquet, in csv a text with `label_separator` between them.
        prompt: the column of the prompts, for ``causal-lm``.
        completion: the column of the completions; naming it makes the file one of
            instructions, without labels.
        unreadable: whether an image that cannot be read ends the run or is left out,
            named and counted; for a folder of images given by `path`.
        max_examples: keep only so many, drawn by `split_seed`. Where there are persons,
            they are drawn, each whole, until the number is reached.
            Where `nominal_examples` is not given, it is a client's equal share of what
            these leave to training.
        max_length: tokens of a text, or of prompt and completion.
        image_size: to which images are scaled; None takes the backbone's own.
    """

    name: str | None = None
    path: str | None = None
    text: str = "text"
    label: str = "label"
    labels: tuple[str, ...] | None = None
    group: str | None = None
    person: str | None = None
    nominal_examples: int | None = Field(default=None, ge=1)
    nominal_persons: int | None = Field(default=None, ge=1)
    test_fraction: float = Field(default=0.16, gt=0, lt=1)
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    split_seed: int = Field(default=0, ge=0)
    max_length: int = Field(default=64, ge=4, le=131_072)
    multi_label: bool = False
    label_separator: str = Field(default=";", min_length=1)
    prompt: str = "prompt"
    completion: str | None = None
    unreadable: Literal["fatal", "skip"] = "fatal"
    max_examples: int | None = Field(default=None, ge=1)
    image_size: int | None = Field(default=None, ge=1, le=2048)

    @model_validator(mode="after")
    def _one_source(self) -> "DataSection":
        if (self.name is None) == (self.path is None):
            raise ValueError("expected either name or path, got both or none")
        if self.completion is not None and (self.labels or self.multi_label):
            raise ValueError("expected no labels beside completion, got some")
        has_classes = self.path is not None and self.completion is None
        if has_classes and (self.labels is None or len(self.labels) < 2):
            raise ValueError(
                "expected labels = [two or more] beside path: labels are declared, "
                "never read from the data"
            )
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError("expected test and validation fractions to leave a rest")
        return self


class PartitionSection(Component):
    """``[partition]``: which client holds which examples."""

    num_clients: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)


class ModelSection(Section):
    """``[model]``: an asset, a local directory, or ``hub:org/model``; and the task.

    Attributes:
        backbone: the frozen model.
        task: what it is asked.
        samples: prompts that the model of ``causal-lm`` goes on with before the first
            round and after the last one, for people to read. They are published.
    """

    backbone: str
    task: Literal["text-classification", "image-classification", "causal-lm"] = (
        "text-classification"
    )
    samples: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _samples_fit(self) -> "ModelSection":
        if self.samples and self.task != "causal-lm":
            raise ValueError(
                f"expected samples beside task = 'causal-lm' alone, got {self.task!r}"
            )
        return self


class PeftSection(Component):
    """``[peft]``: what is trained, and what of it travels.

    Attributes:
        share: parts of the names of the tensors that travel, such as ``["lora_A",
            "head"]``: the others stay at their client and go on there from round to
            round. None lets all travel.
    """

    share: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _something_travels(self) -> "PeftSection":
        if self.share is not None and not all(self.share or [""]):
            raise ValueError(
                "expected share = [one or more parts of names], got "
                f"{list(self.share)}: without anything shared there is no federation"
            )
        return self


class TrainingSection(Section):
    """``[training]``: one client's local training in a round.

    Attributes:
        head_learning_rate: None uses `learning_rate` for the head too.
        decay: of both rates over the run's rounds; ``linear`` ends at 1 / rounds.
        local_epochs: passes over the nominal number of examples, so the number of steps
            is public; a fraction is allowed.
        batch_size: nominal: the divisor; Poisson batches vary around it. For unit
            ``person`` it counts persons. ``"nominal"`` in a file stands for all of
            `nominal_examples`.
        max_physical_batch: examples that pass through the model at once.
        dropout: whether the backbone's own dropout is on while training.
        precision: of the forward and backward pass; parameters stay fp32.
        cache_gib: where everything that trains lies above some depth, what lies below
            is computed once an example and kept in a nameless file of at most this
            size, in each client process; 0 switches it off.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    decay: Literal["none", "linear"] = "none"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    local_epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(ge=1)
    max_physical_batch: int = Field(default=32, ge=1)
    dropout: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    cache_gib: float = Field(default=1.0, ge=0)


class CohortSection(Section):
    """``[cohort]``: how many clients a round, and how they are chosen.

    Attributes:
        size: of a cohort; of the mean cohort where `sampling` is ``poisson``.
        sampling: ``rotation`` is public. ``poisson`` (each client on its own, with
            probability size / num_clients) and ``fixed`` (exactly `size` of them) are
            drawn in secret by the server, and amplify the guarantee of unit
            ``client``; they make sense for it alone.
        min_reply_share: of the cohort; below it the run stops with the reason.
    """

    size: int = Field(ge=1)
    sampling: Literal["rotation", "poisson", "fixed"] = "rotation"
    min_reply_share: float = Field(default=0.6, gt=0, le=1)


class AdaptiveClipping(Section):
    """``[privacy.adaptive_clipping]``: the norm follows a quantile of the updates.

    Attributes:
        quantile: share of the updates that should be shorter than the norm.
        learning_rate: of the norm's logarithm.
        count_noise: standard deviation of the noise on the count of updates within the
            norm, in clients. None takes a twentieth of the cohort, and no less than the
            noise multiplier. It is paid for.
    """

    quantile: float = Field(default=0.5, gt=0, lt=1)
    learning_rate: float = Field(default=0.2, gt=0)
    count_noise: float | None = Field(default=None, gt=0)


class PrivacySection(Section):
    """``[privacy]``: what one epsilon protects, and how much of it may be spent.

    Attributes:
        unit: ``example``, ``person`` or ``client``: neighbouring data differ by one of
            them; or ``none``. The first two are protected at the client, and so against
            the server too; the third by the server, which must be trusted.
        target_epsilon: what this run may spend; the noise is calibrated for it.
        budget_epsilon: what a client's data may release over all runs in its ledger,
            at this run's `target_delta`; None allows `target_epsilon`.
        noise: ``secure`` (a cryptographic keystream) or ``seeded`` (tests and
            reproductions: whoever knows the seed can remove the noise).
        engine: of per-sample gradients: ``taps`` is ours; ``opacus`` knows more layers
            and costs more.
        max_examples_per_person: of one person in one step, drawn at random if there are
            more; unit ``person`` alone.
        mechanism: ``gaussian`` draws each round's noise on its own. ``banded``
            correlates it over the rounds, for unit ``client`` in a rotation.
        adaptive_clipping: for unit ``client``; `clipping_norm` is then the first norm.
    """

    unit: Literal["example", "person", "client", "none"] = "example"
    target_epsilon: float = Field(default=8.0, gt=0)
    target_delta: float = Field(default=1e-5, gt=0, lt=1)
    budget_epsilon: float | None = Field(default=None, gt=0)
    clipping_norm: float = Field(default=1.0, gt=0)
    noise: Literal["secure", "seeded"] = "secure"
    engine: Literal["taps", "opacus"] = "taps"
    max_examples_per_person: int = Field(default=8, ge=1)
    mechanism: Literal["gaussian", "banded"] = "gaussian"
    adaptive_clipping: AdaptiveClipping | None = None


class CompressionSection(Component):
    """``[compression]``: how updates travel up."""

    error_feedback: bool = False


class AggregationSection(Component):
    """``[aggregation]``: the rule, and the optimiser applied to its result."""

    name: str = "mean"
    server_optimizer: Component | None = None


class AuditSection(Section):
    """``[audit]``: what is kept for an auditor, and what an audit tries.

    Attributes:
        record: whether the server keeps every answer as it came, encrypted.
        auditor: the public key that it is encrypted for, as ``fedpeft keys auditor``
            prints it; its owner alone can read the answers.
        attacks: by id, each with its hyperparameters; None tries all that fit. A name
            alone stands for a table with that name.
        aggregate: whether attacks that can are also given what becomes of a round's
            updates together, which every participant sees, without any client's own.
            Where the protected unit is the client they are in any case: its epsilon
            speaks of nothing less.
        victims: clients that are attacked, at most.
        rounds: of a run that are replayed, at most.
        decoys: public records among which the right one is to be found.
        non_members: public records of which an attack asks whether they took part.
        dp_seconds: that experiments against the claimed epsilon may take.
        sample_canaries: public examples with wrong labels that train a copy of the
            model, as one more such experiment with a fifth of that time on top; a round
            that has begun is finished. 0 leaves it out.
        surface: keys such as ``"peft.rank"``, or whole sections, each with the values
            that a leakage surface tries; every combination is one cell.
    """

    record: bool = False
    auditor: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    attacks: tuple[Component, ...] | None = None
    aggregate: bool = False
    victims: int = Field(default=50, ge=2)
    rounds: int = Field(default=4, ge=1)
    decoys: int = Field(default=1000, ge=1)
    non_members: int = Field(default=100, ge=1)
    dp_seconds: float = Field(default=60.0, gt=0)
    sample_canaries: int = Field(default=100, ge=0)
    surface: dict[str, tuple[Any, ...]] = {}

    @model_validator(mode="before")
    @classmethod
    def _names_are_tables(cls, table: Any) -> Any:
        if not isinstance(table, dict) or not isinstance(table.get("attacks"), list):
            return table
        named = [{"name": a} if isinstance(a, str) else a for a in table["attacks"]]
        return {**table, "attacks": named}

    @model_validator(mode="after")
    def _recorded_for_somebody(self) -> "AuditSection":
        if self.record and self.auditor is None:
            raise ValueError(
                "expected auditor = 'a public key' beside record = true: answers are "
                "kept for its owner alone; make one with `fedpeft keys auditor NAME`"
            )
        return self
