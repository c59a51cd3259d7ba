"""The run's configuration: TOML in, a frozen :class:`RunConfig`, TOML out.

An unknown key is an error that names the nearest valid one. A section that chooses a
variant (``[peft]``, ``[compression]``, ...) holds its name and the variant's own
hyperparameters; :func:`build` turns it into the variant.
"""

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from fedpeft.errors import ConfigError
from fedpeft.wording import nearest, one_line

T = TypeVar("T")


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
        nominal_examples: a public constant a client; with the batch size it gives the
            sampling rate. The exact number of a client's examples is never used under
            privacy.
        labels: the classes, declared; they are never read from the data.
        group: the column by which data are split and partitioned (a site, a film).
    """

    name: str | None = None
    path: str | None = None
    text: str = "text"
    label: str = "label"
    labels: tuple[str, ...] | None = None
    group: str | None = None
    nominal_examples: int = Field(ge=1)
    test_fraction: float = Field(default=0.16, gt=0, lt=1)
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    split_seed: int = Field(default=0, ge=0)
    max_length: int = Field(default=64, ge=4)

    @model_validator(mode="after")
    def _one_source(self) -> "DataSection":
        if (self.name is None) == (self.path is None):
            raise ValueError("expected either name or path, got both or none")
        if self.path is not None and (self.labels is None or len(self.labels) < 2):
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
    """``[model]``: an asset, a local directory, or ``hub:org/model``; and the task."""

    backbone: str
    task: Literal["text-classification"] = "text-classification"


class TrainingSection(Section):
    """``[training]``: one client's local training in a round.

    Attributes:
        head_learning_rate: None uses `learning_rate` for the head too.
        decay: of both rates over the run's rounds; ``linear`` ends at 1 / rounds.
        local_epochs: passes over the nominal number of examples, so the number of steps
            is public; a fraction is allowed.
        batch_size: nominal: the divisor; Poisson batches vary around it.
        max_physical_batch: examples that pass through the model at once.
        dropout: whether the backbone's own dropout is on while training.
        precision: of the forward and backward pass; parameters stay fp32.
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


class CohortSection(Section):
    """``[cohort]``: how many clients a round, in a public rotation."""

    size: int = Field(ge=1)
    min_reply_share: float = Field(default=0.6, gt=0, le=1)


class PrivacySection(Section):
    """``[privacy]``: what one epsilon protects, and how much of it may be spent.

    Attributes:
        unit: ``example`` (neighbouring data sets differ by adding or removing one
            example of one client) or ``none``.
        target_epsilon: what this run may spend; the noise is calibrated for it.
        budget_epsilon: what a client's data may release over all runs in its ledger;
            None allows `target_epsilon`.
        noise: ``secure`` (a cryptographic keystream) or ``seeded`` (tests and
            reproductions: whoever knows the seed can remove the noise).
    """

    unit: Literal["example", "none"] = "example"
    target_epsilon: float = Field(default=8.0, gt=0)
    target_delta: float = Field(default=1e-5, gt=0, lt=1)
    budget_epsilon: float | None = Field(default=None, gt=0)
    clipping_norm: float = Field(default=1.0, gt=0)
    noise: Literal["secure", "seeded"] = "secure"


class CompressionSection(Component):
    """``[compression]``: how updates travel up."""

    error_feedback: bool = False


class AggregationSection(Component):
    """``[aggregation]``: the rule, and the optimiser applied to its result."""

    server_optimizer: Component | None = None


class RunConfig(Section):
    """Everything that defines a run."""

    run: RunSection
    data: DataSection
    partition: PartitionSection
    model: ModelSection
    peft: Component
    training: TrainingSection
    cohort: CohortSection
    privacy: PrivacySection = PrivacySection()
    compression: CompressionSection = CompressionSection(name="dense")
    aggregation: AggregationSection = AggregationSection(name="mean")

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.cohort.size > self.partition.num_clients:
            raise ValueError(
                f"expected [cohort] size <= [partition] num_clients = "
                f"{self.partition.num_clients}, got {self.cohort.size}"
            )
        if self.is_private and self.training.batch_size > self.data.nominal_examples:
            raise ValueError(
                f"expected [training] batch_size <= [data] nominal_examples = "
                f"{self.data.nominal_examples}, got {self.training.batch_size}"
            )
        if not self.is_private and self.privacy.budget_epsilon is not None:
            raise ValueError(
                "expected no [privacy] budget_epsilon beside unit = 'none': a release "
                "without privacy exceeds any"
            )
        if self.run.evaluate_on == "validation" and not self.data.validation_fraction:
            raise ValueError(
                "expected [data] validation_fraction > 0 beside [run] evaluate_on = "
                "'validation', got 0"
            )
        weighting = self.aggregation.options.get("weighting", "uniform")
        if self.is_private and weighting != "uniform":
            raise ValueError(
                "expected [aggregation] weighting = 'uniform' under privacy: the "
                f"number of a client's examples is private, got {weighting!r}"
            )
        return self

    @property
    def is_private(self) -> bool:
        """Whether the run claims a privacy guarantee."""
        return self.privacy.unit != "none"

    @property
    def hash(self) -> str:
        """sha256 of everything that shapes the result; not of where or how fast."""
        content = self.model_dump(
            mode="json", exclude={"run": {"id", "state", "workers"}}
        )
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_toml(self) -> str:
        """Returns the file that :meth:`from_toml` reads back to an equal config."""
        text: str = tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
        return text

    @classmethod
    def from_toml(cls, text: str, overrides: Iterable[str] = ()) -> "RunConfig":
        """Reads a file's text; each override is ``section.key=value``.

        Raises:
            ConfigError: one line: what was expected, what came.
        """
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"Expected a TOML file: {error}.") from None
        for override in overrides:
            _override(table, override)
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            raise ConfigError(one_line(error, cls)) from None

    @classmethod
    def from_file(cls, path: Path, overrides: Iterable[str] = ()) -> "RunConfig":
        """Reads a file; see :meth:`from_toml`."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Cannot read the scenario {path}: {error}.") from None
        return cls.from_toml(text, overrides)


def build(menu: Mapping[str, type[T]], component: Component, section: str) -> T:
    """Returns the variant that a section names, with its hyperparameters checked.

    Args:
        menu: name -> frozen dataclass.
        component: the section as read.
        section: its name, for messages.

    Raises:
        ConfigError: for an unknown name or key, or a value the variant refuses.
    """
    if component.name not in menu:
        raise ConfigError(
            f"[{section}] name: expected one of {', '.join(menu)}, got "
            f"{component.name!r}{nearest(component.name, menu)}"
        )
    variant = menu[component.name]
    fields = [field.name for field in dataclasses.fields(variant)]  # type: ignore[arg-type]
    for key in component.options:
        if key not in fields:
            known = [*fields, *type(component).model_fields]
            raise ConfigError(
                f"[{section}] {key}: {component.name} has no such key"
                f"{nearest(key, known)}"
            )
    for key, value in component.options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(
                f"[{section}] {key}: expected a finite number, got {value}."
            )
    try:
        return TypeAdapter(variant).validate_python(component.options)
    except ValidationError as error:
        raise ConfigError(one_line(error, variant, section)) from None


def _override(table: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not sections:
        raise ConfigError(f"--set: expected section.key=value, got {override!r}.")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {path}: {section!r} is not a section.")
    try:
        table[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = value.strip()
