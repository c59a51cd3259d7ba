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
from typing import Any, TypeVar

import tomli_w
from pydantic import TypeAdapter, ValidationError, model_validator

from fedpeft.errors import ConfigError
from fedpeft.sections import (
    AggregationSection,
    AuditSection,
    CohortSection,
    Component,
    CompressionSection,
    DataSection,
    ModelSection,
    PartitionSection,
    PeftSection,
    PrivacySection,
    RunSection,
    Section,
    TrainingSection,
)
from fedpeft.sizes import derive_sizes
from fedpeft.wording import nearest, one_line

T = TypeVar("T")

_DEEPEST = 16
_TOO_DEEP = f"Expected a TOML file of at most {_DEEPEST} tables within each other."


class RunConfig(Section):
    """Everything that defines a run."""

    run: RunSection
    data: DataSection
    partition: PartitionSection
    model: ModelSection
    peft: PeftSection
    training: TrainingSection
    cohort: CohortSection
    privacy: PrivacySection = PrivacySection()
    compression: CompressionSection = CompressionSection(name="dense")
    aggregation: AggregationSection = AggregationSection(name="mean")
    audit: AuditSection = AuditSection()

    @model_validator(mode="before")
    @classmethod
    def _sizes_follow(cls, table: Any) -> Any:
        """Derives what a scenario leaves open, from public constants alone."""
        return derive_sizes(table) if isinstance(table, dict) else table

    @model_validator(mode="after")
    def _cohort_fits(self) -> "RunConfig":
        if self.cohort.size > self.partition.num_clients:
            raise ValueError(
                f"expected [cohort] size <= [partition] num_clients = "
                f"{self.partition.num_clients}, got {self.cohort.size}"
            )
        if self.run.evaluate_on == "validation" and not self.data.validation_fraction:
            raise ValueError(
                "expected [data] validation_fraction > 0 beside [run] evaluate_on = "
                "'validation', got 0"
            )
        return self

    @model_validator(mode="after")
    def _privacy_fits(self) -> "RunConfig":
        if self.privacy.engine == "opacus" and not self.is_dp_sgd:
            raise ValueError(
                "expected [privacy] unit = 'example' or 'person' beside engine = "
                f"'opacus', got unit = {self.privacy.unit!r}"
            )
        if self.privacy.unit == "example" and self.data.nominal_examples is None:
            raise ValueError(
                "expected [data] nominal_examples beside [privacy] unit = 'example'"
            )
        if not self.is_private and self.privacy.budget_epsilon is not None:
            raise ValueError(
                "expected no [privacy] budget_epsilon beside unit = 'none': a release "
                "without privacy exceeds any"
            )
        weighting = self.aggregation.options.get("weighting", "uniform")
        if self.is_private and weighting != "uniform":
            raise ValueError(
                "expected [aggregation] weighting = 'uniform' under privacy: the "
                f"number of a client's examples is private, got {weighting!r}"
            )
        if 0 < self.nominal_units < self.training.batch_size and self.is_dp_sgd:
            key = "persons" if self.privacy.unit == "person" else "examples"
            raise ValueError(
                f"expected [training] batch_size <= [data] nominal_{key} = "
                f"{self.nominal_units}, got {self.training.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _person_fits(self) -> "RunConfig":
        if self.privacy.unit != "person":
            return self
        if self.data.person is None or self.data.nominal_persons is None:
            raise ValueError(
                "expected [data] person and nominal_persons beside [privacy] unit = "
                "'person'"
            )
        most = self.training.max_physical_batch
        if self.privacy.max_examples_per_person > most:
            raise ValueError(
                f"expected [privacy] max_examples_per_person <= [training] "
                f"max_physical_batch = {most}, got "
                f"{self.privacy.max_examples_per_person}: a person's examples pass "
                "through the model together"
            )
        return self

    @model_validator(mode="after")
    def _client_level_fits(self) -> "RunConfig":
        privacy, sampling = self.privacy, self.cohort.sampling
        if privacy.unit == "client":
            if privacy.mechanism == "banded" and sampling != "rotation":
                raise ValueError(
                    "expected [cohort] sampling = 'rotation' beside [privacy] "
                    "mechanism = 'banded', which must know when a client comes again, "
                    f"got {sampling!r}"
                )
            if self.aggregation.name != "mean":
                raise ValueError(
                    "expected [aggregation] name = 'mean' beside [privacy] unit = "
                    f"'client', whose sum is noised, got {self.aggregation.name!r}"
                )
        elif privacy.mechanism != "gaussian" or privacy.adaptive_clipping is not None:
            raise ValueError(
                "expected [privacy] unit = 'client' beside mechanism = 'banded' or "
                f"adaptive_clipping, got unit = {privacy.unit!r}"
            )
        elif sampling != "rotation":
            raise ValueError(
                "expected [cohort] sampling = 'rotation' beside [privacy] unit = "
                f"{privacy.unit!r}, which gains nothing from a secret cohort, got "
                f"{sampling!r}"
            )
        return self

    @model_validator(mode="after")
    def _recording_fits(self) -> "RunConfig":
        if self.audit.record and self.cohort.sampling != "rotation":
            raise ValueError(
                "expected no [audit] record beside [cohort] sampling = "
                f"{self.cohort.sampling!r}: who was drawn is a secret, and what is "
                "kept would tell it"
            )
        return self

    @model_validator(mode="after")
    def _sharing_fits(self) -> "RunConfig":
        if self.peft.share is None:
            return self
        if self.cohort.sampling == "fixed":
            raise ValueError(
                "expected [cohort] sampling = 'poisson' or 'rotation' beside [peft] "
                "share, got 'fixed': a cohort of a fixed size amplifies for clients "
                "without memory, and what stays with them is one"
            )
        if self.model.samples:
            raise ValueError(
                "expected no [model] samples beside [peft] share: the server's own "
                "model lacks what stays with the clients"
            )
        return self

    @property
    def is_private(self) -> bool:
        """Whether the run claims a privacy guarantee."""
        return self.privacy.unit != "none"

    @property
    def is_dp_sgd(self) -> bool:
        """Whether clients clip and noise by themselves, step by step."""
        return self.privacy.unit in ("example", "person")

    @property
    def nominal_units(self) -> int:
        """The public number of examples, or of persons, that a client counts as."""
        by_person = self.privacy.unit == "person"
        data = self.data
        return (data.nominal_persons if by_person else data.nominal_examples) or 0

    @property
    def hash(self) -> str:
        """sha256 of what shapes the result and who sees it; not of where or how fast.

        Of ``[audit]`` it holds what is recorded, which clients agree to; what is
        attacked afterwards changes no run.
        """
        content = self.model_dump(
            mode="json", exclude={"run": {"id", "state", "workers"}, "audit": True}
        )
        if self.audit.record:
            content["audit"] = {"auditor": self.audit.auditor}
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
        except RecursionError:
            raise ConfigError(_TOO_DEEP) from None
        except ValueError as error:  # a number may have more digits than Python reads
            raise ConfigError(f"Expected a TOML file: {error}.") from None
        for override in overrides:
            _override(table, override)
        return cls.from_table(table)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "RunConfig":
        """Reads a file's content, already parsed; see :meth:`from_toml`."""
        _check_values(table)
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


def _check_values(value: object, depth: int = 0) -> None:
    """Refuses numbers and nesting beyond what can be printed without fail."""
    if depth > _DEEPEST:
        raise ConfigError(_TOO_DEEP)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError("Expected whole numbers of 64 bits, got a longer one.")
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_values(part, depth + 1)


def _override(table: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    *sections, key = path.strip().split(".")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        parsed = value.strip()
    if not equals or not (sections or isinstance(parsed, dict)):
        raise ConfigError(
            f"--set: expected section.key=value or section={{...}}, got {override!r}."
        )
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {path}: {section!r} is not a section.")
    table[key] = parsed
