"""Makes victims: runs a scenario and records what each adversary sees of each client.

The data are public, so that the truth is known; the code is the one that clients run.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric import x25519
from safetensors.torch import load_file

from client.answer import answer
from client.messages import TrainRequest
from client.site import Site, open_site
from client.suspicion import suspicion
from fedpeft import keys
from fedpeft.attacks.attack import Case, Knowledge, Observation, Secret, Seen
from fedpeft.audit.observing import broadcast_states, seen_by_client
from fedpeft.audit.recording import Records, read_records
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig
from fedpeft.data import Examples, digest_of, load, partition, split
from fedpeft.errors import RunError, RunStopped
from fedpeft.interfaces import Payload
from fedpeft.model import TaskModel, build_model, shared_state
from fedpeft.seeds import generator
from fedpeft.tensors import Tensors
from server.checkpoint import load_checkpoint
from simulations.engine import simulate

_MOST_SURROGATE = 8000


@dataclass(frozen=True, eq=False)
class Stage:
    """Public data and model of a scenario, dealt to victims and adversary.

    Attributes:
        config: resolved.
        model: as every client builds it.
        parts: each client's records.
        decoys: records of the same kind that no client holds.
        surrogate: further ones, the adversary's own.
    """

    config: RunConfig
    model: TaskModel
    parts: tuple[Examples, ...]
    decoys: Examples
    surrogate: Examples


def set_stage(config: RunConfig) -> Stage:
    """Loads what a scenario trains on, and what it leaves to decoys and adversary.

    **Guarantees**: no decoy and no surrogate has the content of a client's record, and
    none of them is both.

    Raises:
        RunError: if too few records are left.
    """
    train = split(load(config.data), config.data).train
    parts = [train.subset(part) for part in partition(train, config.partition)]
    everything = load(config.data.model_copy(update={"max_examples": None}))
    held = {digest_of(content) for content in train.contents}
    digests = [digest_of(content) for content in everything.contents]
    first = {digest: index for index, digest in reversed([*enumerate(digests)])}
    free = sorted(index for digest, index in first.items() if digest not in held)
    order = torch.randperm(len(free), generator=generator(config.run.seed, "stage"))
    left = [free[position] for position in order.tolist()]
    num_decoys = min(config.audit.decoys, len(left) // 2)
    if num_decoys < 1:
        raise RunError(
            "[audit] decoys: expected public records that no client holds, found "
            f"{len(left)}: lower [data] max_examples."
        )
    return Stage(
        config,
        build_model(config, len(everything.label_names)),
        tuple(parts),
        everything.subset(left[:num_decoys]),
        everything.subset(left[num_decoys:][:_MOST_SURROGATE]),
    )


def observe(
    config: RunConfig, output: Path, most_rounds: int | None = None
) -> list[Case]:
    """Simulates a run, recorded, and returns one case a client that took part.

    Args:
        config: of the run; its data are public.
        output: the run directory, new or empty. What was recorded stays there, sealed
            for a key that is gone afterwards.
        most_rounds: stop after so many, with the plan of the whole run; then there is
            no final model.
    """
    key = x25519.X25519PrivateKey.generate()
    public, config = keys.public_of(key), detached(config)
    final = following = None
    try:
        simulate(config, output, most_rounds=most_rounds, auditor=public)
        final = load_file(output / "model" / "adapter.safetensors")
    except RunStopped:
        progress = load_checkpoint(output / "checkpoint", config.hash)
        following = progress.trainable  # the next round would have begun with it
    config = RunConfig.from_file(output / "config.toml")
    records = read_records(output, config.run.id or "", key)
    return cases_of(set_stage(config), records, final, following)


def detached(config: RunConfig) -> RunConfig:
    """Returns the configuration of another run, with ledgers of its own.

    **Guarantees**: nothing that is run with it is charged to anybody's ledger, or
    written where the configuration says.
    """
    run = config.run.model_copy(update={"id": None, "state": None})
    return config.model_copy(update={"run": run})


def cases_of(
    stage: Stage,
    records: Records,
    final: Tensors | None,
    following: Tensors | None = None,
) -> list[Case]:
    """Returns one case a client that answered, at most ``[audit] victims``.

    Args:
        stage: the data and the model of the run that was recorded.
        records: what it kept.
        final: tensors of the released model, further ones ignored; None if there is
            none.
        following: what the round after the last one kept would have started from; None
            takes the released model, unless that is a mean of several.
    """
    config, model = stage.config, stage.model
    seen = seen_by_client(records, config, model)
    broadcast = broadcast_states(records, config, model)
    if final is not None:
        final = {name: final[name] for name in shared_state(model)}
        following = final if config.run.average_last == 1 else following
    if following is not None and broadcast:
        following = {name: following[name] for name in shared_state(model)}
        broadcast[max(broadcast) + 1] = following
    return _cases(stage, seen, broadcast, final)


def _cases(
    stage: Stage,
    seen: Mapping[int, tuple[Seen, ...]],
    broadcast: Mapping[int, Tensors],
    final: Tensors | None,
) -> list[Case]:
    task = stage.model.task
    knowledge = Knowledge(stage.model, stage.config, task.encode(stage.surrogate))
    decoys = task.encode(stage.decoys)
    victims = list(seen)[: stage.config.audit.victims]
    return [
        Case(
            Observation(
                knowledge,
                seen[client],
                tuple(seen[other] for other in seen if other != client),
                broadcast,
                final,
            ),
            Secret(task.encode(stage.parts[client]), decoys),
        )
        for client in victims
    ]


def with_candidates(cases: Sequence[Case], *, members: int) -> list[Case]:
    """Asks of each client's own records and of public ones whether they took part.

    The public ones are drawn for each client anew: what is said of one client must not
    hang on what is said of another, or intervals over clients come out too narrow.

    Args:
        cases: with decoys, of which ``[audit] non_members`` are asked about.
        members: of each client, at most.
    """
    return [
        _with_candidates(case, members, victim) for victim, case in enumerate(cases)
    ]


def _with_candidates(case: Case, members: int, victim: int) -> Case:
    secret, observation = case.secret, case.observation
    assert secret.decoys is not None
    config = observation.knowledge.config
    own = secret.examples.subset(range(min(members, len(secret.examples))))
    rng = generator(config.run.seed, "non-members", victim)
    drawn = torch.randperm(len(secret.decoys), generator=rng)
    others = secret.decoys.subset(drawn[: config.audit.non_members].tolist())
    is_member = torch.arange(len(own) + len(others)) < len(own)
    candidates, control = own.joined(others), case.control
    return Case(
        replace(observation, candidates=candidates),
        replace(secret, is_member=is_member),
        None if control is None else replace(control, candidates=candidates),
    )


def provoke(stage: Stage, crafted: Tensors) -> list[Case]:
    """Returns what clients would answer to a state that the server has made up.

    They answer even if it looks crafted, see :func:`is_suspected`. One round, in this
    process, by the code that answers requests; nothing is written beyond a temporary
    directory.
    """
    site = open_site(detached(stage.config).to_toml())
    request = _request(site, crafted)
    victims = range(min(len(stage.parts), stage.config.audit.victims))
    seen = {client: (_provoked(site, client, request, crafted),) for client in victims}
    return _cases(stage, seen, {}, None)


def is_suspected(stage: Stage, crafted: Tensors) -> bool:
    """Whether clients refuse to train from a state."""
    site = open_site(detached(stage.config).to_toml())
    return suspicion(site, _request(site, crafted)) is not None


def _request(site: Site, state: Tensors) -> TrainRequest:
    payload = COMPRESSORS["dense"]().compress(state, torch.Generator())
    return TrainRequest(
        run=16 * "0",
        server_round=1,
        config_hash=site.config.hash,
        plan_hash=site.plan.hash if site.plan else "",
        backbone=site.model.fingerprint,
        state=payload.to_bytes(),
    )


def _provoked(site: Site, client: int, request: TrainRequest, crafted: Tensors) -> Seen:
    with tempfile.TemporaryDirectory() as state:
        reply = answer(site, client, Path(state), request, suspects=False)
    if reply.code != "ok":
        raise RunError(
            f"Expected client {client} to answer, got the refusal {reply.code}."
        )
    update = site.compressor.decompress(Payload.from_bytes(reply.payload), crafted)
    return Seen(request.server_round, crafted, update)
