"""From the bytes of a run to observations: what each adversary saw of each client."""

import torch

from fedpeft.attacks.attack import Seen
from fedpeft.audit.recording import Answer, Records
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig, build
from fedpeft.errors import DataError, InvalidPayload
from fedpeft.interfaces import Compressor, Payload
from fedpeft.model import TaskModel, shared_state
from fedpeft.tensors import Tensors


def seen_by_client(
    records: Records, config: RunConfig, model: TaskModel
) -> dict[int, tuple[Seen, ...]]:
    """Returns each client's rounds, in order, decoded as the server decodes them.

    An answer that carried no update is left out, and so is one that the server could
    not read either, or of a client or round that the run does not have: nobody can
    spoil the audit of the others.

    Raises:
        DataError: if what a round started from is missing.
        InvalidPayload: if it is no state of this model.
    """
    template = shared_state(model)
    compressor = build(COMPRESSORS, config.compression, "compression")
    dense = COMPRESSORS["dense"]()
    states = {
        server_round: _decode(dense, payload, template)
        for server_round, payload in records.states.items()
        if server_round <= config.run.rounds
    }
    seen: dict[int, list[Seen]] = {}
    for answer in records.answers:
        if not answer.payload or not _is_possible(answer, config):
            continue
        if answer.server_round not in states:
            raise DataError(
                f"Expected the state of round {answer.server_round} beside its "
                "answers, found none: the records are incomplete."
            )
        try:
            update = _decode(compressor, answer.payload, template)
        except InvalidPayload:
            continue
        part = Seen(answer.server_round, states[answer.server_round], update)
        seen.setdefault(answer.client, []).append(part)
    return {client: tuple(parts) for client, parts in sorted(seen.items())}


def _is_possible(answer: Answer, config: RunConfig) -> bool:
    known = answer.client < config.partition.num_clients
    return known and answer.server_round <= config.run.rounds


def _decode(compressor: Compressor, payload: bytes, like: Tensors) -> Tensors:
    return compressor.decompress(Payload.from_bytes(payload), like)


def aggregate(clients: list[tuple[Seen, ...]]) -> tuple[Seen, ...]:
    """Returns the mean update of each round: what is seen where only a sum is.

    Args:
        clients: each client's rounds, of the same rounds for all.

    Raises:
        ValueError: if a client is missing in a round.
    """
    rounds = [tuple(part.server_round for part in parts) for parts in clients]
    if len(set(rounds)) != 1:
        raise ValueError("Expected all clients in the same rounds, got others.")
    return tuple(
        Seen(
            parts[0].server_round,
            parts[0].state,
            {
                name: torch.stack([part.update[name] for part in parts]).mean(0)
                for name in parts[0].update
            },
        )
        for parts in zip(*clients, strict=True)
    )
