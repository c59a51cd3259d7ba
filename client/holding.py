"""Whose records are trained on, and the name under which their ledger goes on."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from client.settings import OwnDataSection
from fedpeft.config import RunConfig
from fedpeft.data import Encoded, Examples, digest_of, load, partition, split
from fedpeft.errors import ConfigError
from fedpeft.features import KeptFeatures
from fedpeft.wording import one_line

_SOURCE = r"[A-Za-z0-9][\w.-]{0,99}"


@dataclass(frozen=True, eq=False)
class Holding:
    """What one client holds, ready to train on.

    Attributes:
        source: names the records over all runs: one name, one ledger.
        examples: all of them.
        kept: what the frozen part of the model gave for them.
    """

    source: str
    examples: Encoded
    kept: KeptFeatures | None = None


@dataclass(frozen=True, eq=False)
class Records:
    """Records as they were read, and who holds which.

    Attributes:
        examples: of everyone in `parts`, and perhaps of others.
        parts: data source -> indices of its examples, in order of the clients.
    """

    examples: Examples
    parts: dict[str, list[int]]


def read_own(text: str) -> OwnDataSection | None:
    """Reads an :class:`OwnDataSection` from its JSON text; None from an empty one.

    Raises:
        ConfigError: one line: what was expected, what came.
    """
    if not text:
        return None
    try:
        return OwnDataSection.model_validate_json(text)
    except ValidationError as error:
        line = one_line(error, OwnDataSection)
        raise ConfigError(f"The client's own data: {line}") from None


def read_records(config: RunConfig, own: OwnDataSection | None) -> Records:
    """Reads what this process trains on.

    Args:
        config: of the run.
        own: a client's own records; None for all clients of a simulation, to whom the
            scenario's data are dealt.

    Raises:
        ConfigError: if the two do not fit together.
        DataError: if a file cannot be read as they describe it.
    """
    if own is not None and own.path is not None:
        return _own_file(config, own, own.path)
    train = split(load(config.data), config.data).train
    parts = partition(train, config.partition)
    digest = partition_digest(train, parts)
    dealt = {f"client-{i:03d}-{digest}": part for i, part in enumerate(parts)}
    if own is None:
        return Records(train, dealt)
    share = own.share or 0
    if share >= len(parts):
        raise ConfigError(
            f"[data] share: expected a part below [partition] num_clients = "
            f"{len(parts)}, got {share}."
        )
    part = train.subset(parts[share])
    return Records(part, {list(dealt)[share]: list(range(len(part)))})


def partition_digest(examples: Examples, parts: list[list[int]]) -> str:
    """Returns a short hash of whose records each client holds, whatever led to it.

    Runs that differ in method, seed or length share ledgers. Runs in which any record
    lies elsewhere, was changed or is new do not: a ledger that went on under another
    deal of the same records would count some of them at two clients.
    """
    digest = hashlib.sha256()
    for indices in parts:
        held = sorted(
            (
                digest_of(examples.contents[i]),
                _label(examples, i),
                examples.persons[i] if examples.persons else "",
            )
            for i in indices
        )
        digest.update(json.dumps(held).encode())
    return digest.hexdigest()[:8]


def _label(examples: Examples, index: int) -> str | list[int]:
    label = examples.labels[index]
    if examples.is_multi_label:
        chosen: list[int] = label.tolist()
        return chosen
    return examples.label_names[int(label)]


def _own_file(config: RunConfig, own: OwnDataSection, path: Path) -> Records:
    """Reads a client's own file: every row is an example of its own source."""
    _check_task(config, own)
    if config.privacy.unit == "person" and own.person is None:
        raise ConfigError(
            "[data] person: expected the column that says whose a row is, since the "
            "plan's unit is the person, got none; add it to this client's file."
        )
    section = config.data.model_copy(
        update={
            "name": None,
            "path": str(path),
            "max_examples": None,
            "text": own.text,
            "label": own.label,
            "person": own.person,
            "prompt": own.prompt or config.data.prompt,
            "completion": own.completion or config.data.completion,
            "label_separator": own.label_separator or config.data.label_separator,
            "unreadable": own.unreadable,
            "group": None,
        }
    )
    examples = load(section)
    return Records(examples, {_source(own, path): list(range(len(examples)))})


def _check_task(config: RunConfig, own: OwnDataSection) -> None:
    """Refuses a file of which it is not said what is to be learned."""
    data = config.data
    if config.model.task == "causal-lm":
        if own.completion is None and data.completion is None:
            raise ConfigError(
                "[data] completion: expected the column of the completions, since the "
                "scenario names none, got none; add it to this client's file."
            )
    elif own.completion is not None:
        raise ConfigError(
            f"[data] completion: expected none, since the plan's task is "
            f"{config.model.task}, got {own.completion!r}; remove the key."
        )
    elif data.labels is None:
        raise ConfigError(
            f"[data] labels: expected the scenario to declare them, got none beside "
            f"name = {data.name!r}: a client with a file of its own does not load that "
            "data set. Ask the server's operator to add them."
        )


def _source(own: OwnDataSection, path: Path) -> str:
    """Returns the name of a client's own records.

    It holds no digest: over the months records come and go, and each of them is charged
    with all that was released while it was there. Under a new name the budget would
    start afresh with every row that is added.
    """
    source = own.source or path.stem
    if not re.fullmatch(_SOURCE, source):
        raise ConfigError(
            "[data] source: expected a name of letters, digits, '.', '_' and '-', got "
            f"the file's, {source!r}; give the records a name."
        )
    return source
