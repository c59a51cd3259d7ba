"""One request, one answer: check, train, compress, commit."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from client.messages import Code, TrainReply, TrainRequest
from client.site import Site
from fedpeft.compression import COMPRESSORS
from fedpeft.errors import FedpeftError, LedgerError, PrivacyBudgetExceeded
from fedpeft.interfaces import Payload
from fedpeft.model import trainable_state
from fedpeft.privacy import (
    ENROLMENT,
    Question,
    Randomness,
    Release,
    RequestConflict,
    SecureRandomness,
    SeededRandomness,
    data_sources,
    noise_ahead,
    open_release,
)
from fedpeft.seeds import derive_seed, generator
from fedpeft.tensors import Tensors, zeros_like
from fedpeft.training import decayed, shuffled_batches, train_locally

logger = logging.getLogger(__name__)


def answer(site: Site, client: int, state: Path, request: TrainRequest) -> TrainReply:
    """Answers a train request, or refuses it with a code.

    Args:
        site: what the process keeps warm.
        client: index of the client's data.
        state: the client's own state directory.
        request: as received; nothing in it is believed.
    """
    mismatch = _mismatch(site, request)
    if mismatch:
        return _refuse(client, request, mismatch, "the server's copy is another one")
    foreign = [s for s in data_sources(state) if not s.endswith(site.digest)]
    if foreign:
        reason = f"the state directory counts other records, as {foreign[0]}"
        return _refuse(client, request, "ledger-refused", reason)
    try:
        with (
            _randomness(site, client, request.server_round) as randomness,
            open_release(
                state,
                site.data_source(client),
                plan=site.plan,
                randomness=randomness,
                backbone=site.model.fingerprint,
                budget_epsilon=site.config.privacy.budget_epsilon,
            ) as release,
        ):
            if request.server_round == ENROLMENT:
                return _join(release, request)
            return _answer(site, client, release, request)
    except RequestConflict as error:
        return _refuse(client, request, "request-conflict", str(error))
    except LedgerError as error:
        return _refuse(client, request, "ledger-refused", str(error))
    except PrivacyBudgetExceeded as error:
        return _refuse(client, request, "budget-spent", str(error))
    except (FedpeftError, OSError) as error:
        return _refuse(client, request, "failed", str(error))


def _join(release: Release, request: TrainRequest) -> TrainReply:
    release.confirm(request.ledger_length, request.ledger_head)
    question = Question(request.run, request.server_round, request.hash)
    final = release.enrol(question)
    return TrainReply("ok", final.payload, final.ledger_length, final.ledger_head)


def _answer(
    site: Site, client: int, release: Release, request: TrainRequest
) -> TrainReply:
    question = Question(request.run, request.server_round, request.hash)
    release.confirm(request.ledger_length, request.ledger_head)
    final = release.repeat(question)
    if final is None:
        release.authorise(question)
        try:
            update = _train(site, client, release, request)
            payload, residual = _compress(site, client, release, request, update)
        except Exception:
            release.forfeit(question)
            raise
        final = release.commit(question, payload.to_bytes(), residual)
    release.discard(request.run, request.durable_round)
    return TrainReply(
        "ok" if final.payload else "failed",
        final.payload,
        final.ledger_length,
        final.ledger_head,
        num_examples=-1 if site.plan else len(site.clients[client]),
    )


def _train(site: Site, client: int, release: Release, request: TrainRequest) -> Tensors:
    examples, section = site.clients[client], site.config.training
    template = trainable_state(site.model)
    payload = Payload.from_bytes(request.state)
    seed = derive_seed(site.config.run.seed, "client", client, request.server_round)
    mask_seed = derive_seed(seed, "dropout")
    if site.plan and site.plan.is_dp_sgd:
        mask_seed = release.draws.mask_seed()
        batches = release.draws.batches(site.units(client))
    else:
        rng = generator(seed, "batches")
        epochs, size = section.local_epochs, section.batch_size
        batches = shuffled_batches(len(examples), size, epochs, rng)
    return train_locally(
        site.model,
        COMPRESSORS["dense"]().decompress(payload, template),
        examples,
        batches,
        engine=site.engine,
        noise=release.draws.noise,
        section=section,
        rate_factor=decayed(section, request.server_round, site.config.run.rounds),
        mask_seed=mask_seed,
    )


def _compress(
    site: Site,
    client: int,
    release: Release,
    request: TrainRequest,
    update: Tensors,
) -> tuple[Payload, Tensors]:
    """Compresses what is already private: post-processing, free of charge."""
    seed = site.config.run.seed
    rng = generator(seed, "compression", client, request.server_round)
    if site.error_feedback is None:
        return site.compressor.compress(update, rng), {}
    residual = release.residual(request.run) or zeros_like(update)
    return site.error_feedback.compress(update, residual, rng)


@contextlib.contextmanager
def _randomness(site: Site, client: int, server_round: int) -> Iterator[Randomness]:
    """Gives the source of this answer's batches and noise."""
    if site.config.privacy.noise == "seeded":
        # With the configuration's hash, different configurations never share noise.
        purpose = ("noise", site.config.hash, client, server_round)
        yield SeededRandomness(derive_seed(site.config.run.seed, *purpose))
    elif site.plan and site.plan.is_dp_sgd and site.model.device.type == "cuda":
        size = sum(t.numel() for t in trainable_state(site.model).values())
        with noise_ahead(SecureRandomness(), size, site.plan.local_steps) as ahead:
            yield ahead
    else:
        yield SecureRandomness()


def _mismatch(site: Site, request: TrainRequest) -> Code | None:
    """Compares the request with the client's own copy of what was agreed."""
    plan_hash = site.plan.hash if site.plan else ""
    if (request.config_hash, request.plan_hash) != (site.config.hash, plan_hash):
        return "config-mismatch"
    first = ENROLMENT if site.plan and site.plan.is_secret else 1
    if not first <= request.server_round <= site.config.run.rounds:
        return "config-mismatch"
    if request.backbone != site.model.fingerprint:
        return "backbone-mismatch"
    return None


def _refuse(client: int, request: TrainRequest, code: Code, reason: str) -> TrainReply:
    logger.warning(
        "client=%d round=%d refused=%s: %s", client, request.server_round, code, reason
    )
    return TrainReply(code)
