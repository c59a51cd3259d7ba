"""What a client can find out about itself, in words for its operator's eyes alone.

Each function says what it found, or raises what is wrong.
"""

import shutil
import tempfile
import time
from pathlib import Path

import torch

from client.agreement import Proposal, budget_in_force
from client.holding import read_records
from client.settings import ClientSection, LimitsSection, OwnDataSection
from client.site import Site
from fedpeft.config import RunConfig
from fedpeft.data import Examples
from fedpeft.errors import RunError
from fedpeft.keys import load_pair
from fedpeft.model import trainable_state
from fedpeft.privacy import (
    ENROLMENT,
    SecureRandomness,
    admits,
    data_sources,
    epsilon,
    verify,
)
from fedpeft.privacy.authorisation import authorise
from fedpeft.privacy.draws import Draws
from fedpeft.privacy.ledger import Entry
from fedpeft.training import example_losses, shuffled_batches, train_locally

_ROOM_BYTES = 100 << 20
_FAR = 2.0
"""Times the nominal number, either way, from which on it is worth a word."""


def find_keys(section: ClientSection) -> str:
    """Reads certificate and key; the certificate must be in the client's name."""
    if not (section.certificate and section.key and section.ca):
        return "none: insecure = true, on loopback alone"
    pair = load_pair(section.certificate, section.key, section.ca, role="client")
    if pair.name != section.name:
        raise RunError(
            f"Expected a certificate of {section.name}, got one of {pair.name}."
        )
    until = f"of {pair.name}, until {pair.expires:%Y-%m-%d}"
    return f"{until}: renew them soon" if pair.expires_soon else until


def find_data(config: RunConfig, own: OwnDataSection) -> str:
    """Reads the records: counts, and whether the nominal number is near them."""
    records = read_records(config, own)
    examples, (source,) = records.examples, records.parts
    told = [f"{len(examples)} rows", *_class_counts(examples)]
    persons = len(set(examples.persons or ()))
    if persons:
        told.append(f"{persons} persons")
    units = persons if config.privacy.unit == "person" else len(examples)
    return f"{source}: {', '.join(told)}{_far(units, config.nominal_units)}"


def _class_counts(examples: Examples) -> list[str]:
    """Counts the examples of each class; nothing where there are no classes."""
    names, labels = examples.label_names, examples.labels
    if len(names) < 2:
        return []
    if examples.is_multi_label:
        counts = labels.sum(0)
    else:
        counts = labels.bincount(minlength=len(names))
    return [f"{n} {name}" for n, name in zip(counts.tolist(), names, strict=True)]


def _far(units: int, nominal: int) -> str:
    if not nominal or nominal / _FAR <= units <= nominal * _FAR:
        return ""
    if units < nominal:
        return f"; far below the nominal {nominal}: the noise will drown its updates"
    return (
        f"; far above the nominal {nominal}: with a truer number a lower sampling rate "
        "would do, at less epsilon"
    )


def find_step(site: Site, state: Path) -> str:
    """Trains one step in memory; the state directory must stay as it is."""
    before = _files(state)
    started = time.monotonic()
    _dry_step(site)
    seconds = time.monotonic() - started
    if _files(state) != before:
        raise RunError(f"Expected {state} untouched, something changed in it.")
    steps = f", {site.plan.local_steps} a round" if site.plan else ""
    return f"losses and update are finite; {seconds:.1f} s a step{steps}"


def _dry_step(site: Site) -> None:
    """Draws a batch and noise as the plan says, trains, and forgets the update."""
    examples, section = site.holding(0).examples, site.config.training
    some = list(range(min(len(examples), section.max_physical_batch)))
    with torch.no_grad():
        losses = example_losses(site.model, examples, some, section)
    draws = Draws(site.plan, SecureRandomness())
    if site.plan and site.plan.is_dp_sgd:
        batches = draws.batches(examples.units(site.config.privacy.unit == "person"))
    else:
        size = section.batch_size
        batches = shuffled_batches(len(examples), size, 1.0, torch.Generator())
    update = train_locally(
        site.model,
        trainable_state(site.model),
        examples,
        [next(batches)],
        engine=site.engine,
        noise=draws.noise,
        section=section,
        rate_factor=1.0,
        mask_seed=0,
    )
    if not all(bool(t.isfinite().all()) for t in (losses, *update.values())):
        raise RunError("Expected finite losses and a finite update, got others.")


def _files(state: Path) -> dict[Path, tuple[int, int]]:
    """Returns every file's size and time of change."""
    stats = {path: path.stat() for path in state.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def released(state: Path) -> list[Entry]:
    """Returns all that was released, from a copy: to verify a ledger repairs it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "state"
        shutil.copytree(state, copy)
        return [e for name in data_sources(copy) for e in verify(copy, name).entries]


def find_ledger(state: Path) -> str:
    """Verifies ledger, head and outbox."""
    entries = released(state)
    runs = len({entry.run for entry in entries})
    return f"whole: {len(entries)} releases in {runs} runs"


def find_budget(proposal: Proposal, limits: LimitsSection, state: Path) -> str:
    """Says what is left over all runs; it must be enough for the rest of this one."""
    plan, privacy = proposal.plan, proposal.config.privacy
    if plan is None:
        return "none: the run promises no privacy"
    entries = released(state)
    own = [entry for entry in entries if entry.run == proposal.run]
    rest = plan.max_participations - sum(entry.round != ENROLMENT for entry in own)
    if rest <= 0 or (plan.is_secret and own):
        return "this run's rounds are all paid for"
    budget = budget_in_force(proposal.config, limits.budget_epsilon)
    authorise(
        plan,
        [entry for entry in entries if entry.run != proposal.run],
        proposal.run,
        ENROLMENT if plan.is_secret else 1,
        is_seeded=privacy.noise == "seeded",
        budget_epsilon=budget,
    )
    history = [entry.composition for entry in entries]
    delta, whole = plan.target_delta, plan.composition(rest)
    spent = epsilon(history, delta)
    if not admits(history, whole, budget_epsilon=budget, delta=delta):
        raise RunError(
            f"Expected room for {rest} more rounds, got less: {spent:.2f} is spent of "
            f"epsilon {budget:g} over all runs."
        )
    return f"{spent:.2f} spent of {budget:g} over all runs; {rest} more rounds fit"


def find_disk(state: Path) -> str:
    """Looks for room."""
    free = shutil.disk_usage(state).free
    if free < _ROOM_BYTES:
        raise RunError(f"Expected {_ROOM_BYTES >> 20} MB free, found {free >> 20} MB.")
    return f"{free / 1e9:.1f} GB free"
