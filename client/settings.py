"""The client's own file: where its server, its keys, its data and its limits are.

Nothing in it travels, and nothing that the server says can change it.
"""

import tomllib
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from fedpeft.errors import ConfigError
from fedpeft.sections import Section
from fedpeft.wording import one_line

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Where a connection without encryption may go."""

S = TypeVar("S", bound=Section)


class TransportSection(Section):
    """Keys of either side; paths count from the file's own folder.

    Attributes:
        certificate: this side's, PEM.
        key: its private key, PEM, readable by its owner alone.
        ca: the certificate of the authority that signed the other side's.
        insecure: no encryption and no proof of who speaks; on loopback alone.
    """

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    insecure: bool = False

    @model_validator(mode="after")
    def _keys_are_whole(self) -> "TransportSection":
        keys = (self.certificate, self.key, self.ca)
        if self.insecure and any(keys):
            raise ValueError("expected no keys beside insecure = true")
        if not self.insecure and not all(keys):
            raise ValueError(
                "expected certificate, key and ca; make them with `fedpeft keys`"
            )
        return self


class ClientSection(TransportSection):
    """``[client]``: whom to answer, as whom, and where to remember it.

    Attributes:
        server: ``host:port``.
        name: who this client is; its certificate says so too, and must agree.
        state: directory of ledger, outbox and accepted plans: the client's memory.
        accept: hash of the plan that the operator accepts, as the client printed it.
        max_message_bytes: of one request; a longer one is refused unread.
        threads: of one training step. With one, as in a simulation, results are equal
            to a simulation's bit for bit, if the noise is seeded.
    """

    server: str
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    state: Path
    accept: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    max_message_bytes: int = Field(default=1 << 30, ge=1 << 16)
    threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _insecure_stays_here(self) -> "ClientSection":
        if self.insecure and host_of(self.server) not in LOOPBACK:
            raise ValueError(
                f"expected a server on loopback beside insecure = true, got "
                f"{self.server}"
            )
        return self


class OwnDataSection(Section):
    """``[data]``: this client's records.

    Attributes:
        path: a csv, jsonl or parquet file, or a folder of images with a folder a label;
            all in it is trained on. It is read when the client starts: what changes
            counts from the next start on.
        source: names these records over all runs; their ledger is found by it. The
            file's name without its ending by default.
        prompt: the column of the prompts, for ``causal-lm``; None takes the scenario's.
        completion: the column of the completions, as `prompt`.
        label_separator: between several labels of a row; None takes the scenario's.
        unreadable: whether an image that cannot be read stops this client or is left
            out, with a warning.
        share: instead of `path`, for rehearsals: this client's part, from 0, of the
            scenario's own data.
    """

    path: Path | None = None
    source: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]{0,99}$")
    text: str = "text"
    label: str = "label"
    person: str | None = None
    prompt: str | None = None
    completion: str | None = None
    label_separator: str | None = Field(default=None, min_length=1)
    unreadable: Literal["fatal", "skip"] = "fatal"
    share: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> "OwnDataSection":
        if (self.path is None) == (self.share is None):
            raise ValueError("expected either path or share, got both or none")
        return self


class LimitsSection(Section):
    """``[limits]``: what this client grants at most, whatever plan was accepted.

    Attributes:
        max_epsilon: of one run's plan.
        max_delta: of one run's plan.
        budget_epsilon: over all runs in the ledger.
        units: of privacy; a plan of another is refused.
        seeded_noise: whether a plan's noise may come from a seed, as in a rehearsal:
            whoever knows the seed can remove it.
    """

    max_epsilon: float | None = Field(default=None, gt=0)
    max_delta: float | None = Field(default=None, gt=0, lt=1)
    budget_epsilon: float | None = Field(default=None, gt=0)
    units: tuple[Literal["example", "person", "client", "none"], ...] = (
        "example",
        "person",
    )
    seeded_noise: bool = False


class ClientSettings(Section):
    """The whole file of ``fedpeft client``."""

    client: ClientSection
    data: OwnDataSection
    limits: LimitsSection = LimitsSection()


def read_settings(path: Path, kind: type[S]) -> S:
    """Reads a settings file; its relative paths count from its own folder.

    Raises:
        ConfigError: one line: what was expected, what came.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"Cannot read the settings {path}: {error}.") from None
    try:
        settings = kind.model_validate(table)
    except ValidationError as error:
        raise ConfigError(one_line(error, kind)) from None
    return _anchored(settings, path.absolute().parent)


def host_of(address: str) -> str:
    """Returns the host of ``host:port``; an IPv6 host stands in brackets.

    >>> host_of("[::1]:9443"), host_of("fl.example.org:9443")
    ('::1', 'fl.example.org')
    """
    return address.rpartition(":")[0].strip("[]")


def _anchored(section: S, folder: Path) -> S:
    """Makes every path of a section, and of the sections within, absolute."""
    changes: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            changes[name] = folder / value.expanduser()
        elif isinstance(value, Section):
            changes[name] = _anchored(value, folder)
    return section.model_copy(update=changes)
