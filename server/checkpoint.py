"""The last complete round on disk, and the one before it.

Each is one safetensors file, replaced atomically, with a digest over its content: a
damaged newest file is noticed, and the run goes on from the one before.
"""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedpeft.durable import write_atomically
from fedpeft.errors import RunError
from fedpeft.interfaces import State
from fedpeft.tensors import Tensors, fingerprint, with_prefix, without_prefix

FORMAT = 2
"""1 had no reply codes in its records."""

logger = logging.getLogger(__name__)


class NewerFormat(Exception):
    """A checkpoint of a format that this version does not know."""


@dataclass
class Progress:
    """The server's state after a round.

    Attributes:
        server_round: the last complete round; 0 before the first.
        trainable: the trainable state that the next round starts from.
        aggregator: what the aggregator carries.
        tail: sum of the trainable states of the rounds that the final model averages.
        records: one a round, as in ``events.jsonl``.
        acknowledged: client -> length and head of its ledger when it last answered.
        asked: client -> how many rounds it was asked to take part in.
    """

    server_round: int
    trainable: Tensors
    aggregator: State
    tail: Tensors
    records: list[dict[str, Any]] = field(default_factory=list)
    acknowledged: dict[int, tuple[int, str]] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)


def save_checkpoint(folder: Path, progress: Progress, config_hash: str) -> None:
    """Writes the round durably; keeps it and the one before.

    Raises:
        OSError: for example on a full disk; what was there stays.
    """
    tensors = {
        **with_prefix("trainable", progress.trainable),
        **with_prefix("aggregator", progress.aggregator),
        **with_prefix("tail", progress.tail),
    }
    facts = {
        "format": FORMAT,
        "config_hash": config_hash,
        **{
            f.name: getattr(progress, f.name)
            for f in dataclasses.fields(progress)
            if f.name not in ("trainable", "aggregator", "tail")
        },
    }
    text = json.dumps(facts)
    metadata = {"facts": text, "digest": _digest(tensors, text)}
    data = save(tensors, metadata=metadata)
    write_atomically(folder / f"round-{progress.server_round:06d}.safetensors", data)
    for old in _files(folder)[:-2]:
        old.unlink()


def has_checkpoint(folder: Path) -> bool:
    """Returns whether any round was ever saved here, whole or not."""
    return bool(_files(folder))


def load_checkpoint(
    folder: Path, config_hash: str, *, may_fall_back: bool = True
) -> Progress:
    """Returns the last complete round; falls back, and says so, if it is damaged.

    Args:
        folder: where checkpoints are.
        config_hash: of the configuration that goes on.
        may_fall_back: False where the server adds the noise: a round that was released
            would be released again, with other noise on the same answers.

    Raises:
        RunError: if there is none, none is whole, or the configuration is another.
    """
    files = _files(folder)
    for path in reversed(files):
        try:
            facts, tensors = _read(path)
        except NewerFormat as error:
            raise RunError(
                f"{path} was written by a newer fedpeft, in format {error}; this one "
                f"reads up to {FORMAT}: update it."
            ) from None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            if not may_fall_back:
                raise RunError(
                    f"The newest checkpoint, {path.name}, is damaged, and the one "
                    "before it would release a round a second time: start a new run."
                ) from None
            logger.warning(
                "checkpoint=%s damaged: %s; trying the one before", path.name, error
            )
            continue
        if facts.pop("config_hash") != config_hash:
            raise RunError(
                f"Expected the configuration that {folder.parent} was started with, "
                "got a changed one; start it in another output directory."
            )
        return _progress(facts, tensors)
    if files:
        raise RunError(
            f"No checkpoint in {folder} is whole: the run cannot be resumed."
        )
    raise RunError(f"No checkpoint in {folder}: the run had not finished its start.")


def _progress(facts: dict[str, Any], tensors: Tensors) -> Progress:
    return Progress(
        server_round=facts["server_round"],
        trainable=without_prefix("trainable", tensors),
        aggregator=without_prefix("aggregator", tensors),
        tail=without_prefix("tail", tensors),
        records=facts["records"],
        acknowledged={int(k): tuple(v) for k, v in facts["acknowledged"].items()},
        asked={int(k): v for k, v in facts["asked"].items()},
    )


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _digest(tensors, metadata["facts"]) != metadata["digest"]:
        raise ValueError("its digest is wrong")
    return _migrated(json.loads(metadata["facts"])), tensors


def _migrated(facts: dict[str, Any]) -> dict[str, Any]:
    """Brings the facts of an earlier format up to this one."""
    found = facts.pop("format")
    if found > FORMAT:
        raise NewerFormat(found)
    if found == 1:
        for record in facts["records"]:
            record.setdefault("codes", None)
    return facts


def _digest(tensors: Tensors, text: str) -> str:
    content = fingerprint(tensors.items()) + text
    return hashlib.sha256(content.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.safetensors"))
