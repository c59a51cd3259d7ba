"""From the bytes of a run to observations: what each adversary saw of each client."""

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
    states = broadcast_states(records, config, model)
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
        told = answer.header.get("num_examples")
        number = told if isinstance(told, int) and told > 0 else None
        state = states[answer.server_round]
        part = Seen(answer.server_round, state, update, number, answer.in_vain)
        seen.setdefault(answer.client, []).append(part)
    return {client: tuple(parts) for client, parts in sorted(seen.items())}


def broadcast_states(
    records: Records, config: RunConfig, model: TaskModel
) -> dict[int, Tensors]:
    """Returns the state that each round started from, in order.

    Raises:
        InvalidPayload: if one is no state of this model.
    """
    dense, template = COMPRESSORS["dense"](), shared_state(model)
    return {
        server_round: _decode(dense, payload, template)
        for server_round, payload in sorted(records.states.items())
        if server_round <= config.run.rounds
    }


def _is_possible(answer: Answer, config: RunConfig) -> bool:
    known = answer.client < config.partition.num_clients
    accepted = answer.header.get("code", "ok") == "ok"
    return known and accepted and answer.server_round <= config.run.rounds


def _decode(compressor: Compressor, payload: bytes, like: Tensors) -> Tensors:
    return compressor.decompress(Payload.from_bytes(payload), like)
