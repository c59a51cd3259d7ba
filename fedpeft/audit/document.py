"""``report.json``: an audit, its verdict and its findings as one document, and back.

``schema.json`` beside this file says what may stand in it (JSON Schema 2020-12). The
number infinity is written as the text ``infinity``; what is not known is null.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.findings import findings
from fedpeft.audit.gates import Verdict
from fedpeft.audit.results import AttackResult, Audit, Estimate
from fedpeft.audit.wording import threat_words
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError

SCHEMA_VERSION = 1

_NAMES: dict[type, dict[str, str]] = {
    Audit: {"claim": "dp_claim", "dp_trials": "dp_audit", "checks": "integrity_checks"},
    AttackResult: {"attack": "id", "records": "n"},
    Estimate: {"low": "ci_lo", "high": "ci_hi"},
}
"""What a field is called in the document, where that is another name."""

_PATHS = (("data", "path"), ("run", "state"))
_RUN = ("created", "config", "config_hash")
_ESTIMATES = ("metrics", "baseline", "prior_only", "difference")
_VALUES = ("values", "control_values")
_SLICE = ("found", "control")
_THREAT = [field.name for field in dataclasses.fields(ThreatModel)]


def schema() -> dict[str, Any]:
    """Returns the published schema."""
    text = files("fedpeft.audit").joinpath("schema.json").read_text("utf-8")
    return dict(json.loads(text))


def to_document(audit: Audit, verdict: Verdict) -> dict[str, Any]:
    """Returns what ``report.json`` holds.

    **Guarantees**: plain JSON without NaN, so :func:`json.dumps` takes it with
    ``allow_nan=False``; it holds no more of clients than the audit does.
    """
    document: dict[str, Any] = _encode(audit)
    run = {"id": document.pop("run"), **{name: document.pop(name) for name in _RUN}}
    threats = {result.threat for result in (*audit.attacks, *audit.surface)}
    for result in (*document["attacks"], *document["surface"]):
        result["threat"] = threat_id(ThreatModel(**result["threat"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "run": run,
        **document,
        "threat_models": [_threat(each) for each in sorted(threats, key=threat_id)],
        "policy": verdict.policy,
        "gates": [_encode(gate) for gate in verdict.gates],
        "outcome": {"name": verdict.outcome, "exit_code": verdict.exit_code},
        "findings": [_encode(each) for each in findings(audit, verdict)],
    }


def without_folders(config: RunConfig) -> dict[str, Any]:
    """Returns all sections; of files and folders the name alone.

    Where somebody keeps their data is nobody else's business.
    """
    sections: dict[str, Any] = config.model_dump(mode="json")
    for section, key in _PATHS:
        if sections[section][key] is not None:
            sections[section][key] = Path(sections[section][key]).name
    backbone = sections["model"]["backbone"]
    if Path(backbone).expanduser().is_absolute():  # else an asset, or of the hub
        sections["model"]["backbone"] = Path(backbone).name
    return sections


def to_text(document: Mapping[str, Any]) -> str:
    """Returns the file's text: keys in order, two letters of indentation."""
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_document(document: Mapping[str, Any]) -> Audit:
    """Returns the audit that a document was made of; the verdict is not read.

    Raises:
        ConfigError: if it is no such document, or one of another version.
    """
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"Expected a report of schema_version {SCHEMA_VERSION}, got "
            f"{document.get('schema_version')!r}: read it with the version of fedpeft "
            "that wrote it."
        )
    try:
        whole = _numbers(document)
        threats = {each["id"]: each for each in whole["threat_models"]}
        fields = _fields(Audit, whole)
        for name in ("attacks", "surface"):
            fields[name] = [_attack(each, threats) for each in fields[name]]
        run = fields.pop("run")
        return TypeAdapter(Audit).validate_python({**fields, **run, "run": run["id"]})
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Expected a whole report, got one without {error}."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"Expected a whole report: {where}: {first['msg']}."
        ) from None


def threat_id(threat: ThreatModel) -> str:
    """Returns a threat model's name in a report.

    >>> threat_id(ThreatModel("C", "updates", "reconstruct"))
    'C/updates/reconstruct/verified/raw'
    """
    return "/".join(getattr(threat, name) for name in _THREAT)


def _threat(threat: ThreatModel) -> dict[str, str]:
    facts = dataclasses.asdict(threat)
    return {"id": threat_id(threat), **facts, "description": threat_words(threat)}


def _attack(table: Any, threats: Mapping[str, Any]) -> dict[str, Any]:
    fields = _fields(AttackResult, table)
    for group in _ESTIMATES:
        fields[group] = {n: _estimate(each) for n, each in fields[group].items()}
    for group in _VALUES:
        found = fields.get(group, {})  # older documents have none
        fields[group] = {n: [*map(_known, each)] for n, each in found.items()}
    fields["by_class"] = {
        name: {**each, **{part: _estimate(each[part]) for part in _SLICE}}
        for name, each in fields.get("by_class", {}).items()
    }
    threat = threats[fields["threat"]]
    return {**fields, "threat": {name: threat[name] for name in _THREAT}}


def _estimate(table: Any) -> dict[str, Any]:
    return {key: _known(part) for key, part in _fields(Estimate, table).items()}


def _fields(kind: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes the renaming of one record's fields."""
    back = {name: field for field, name in _NAMES[kind].items()}
    return {back.get(name, name): part for name, part in table.items()}


def _known(value: Any) -> Any:
    return math.nan if value is None else value


def _encode(value: Any) -> Any:
    """Turns what an audit holds into JSON; dataclasses become objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = _NAMES.get(type(value), {})
        return {
            names.get(field.name, field.name): _encode(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _encode(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        return "infinity" if value > 0 else "-infinity"
    return value if isinstance(value, str | int | float | None) else str(value)


def _numbers(value: Any) -> Any:
    """Reads the texts that stand for infinity."""
    if isinstance(value, Mapping):
        return {name: _numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    if value in ("infinity", "-infinity"):
        return float(value)
    return value
