"""A client's update: trained on its records, made private, compressed."""

import contextlib
from collections.abc import Iterator

from client.holding import Holding
from client.messages import TrainRequest
from client.site import Site
from fedpeft.compression import COMPRESSORS
from fedpeft.interfaces import Payload
from fedpeft.model import local_state, shared_state, trainable_state
from fedpeft.privacy import (
    Memory,
    Randomness,
    Release,
    SecureRandomness,
    SeededRandomness,
    noise_ahead,
)
from fedpeft.seeds import derive_seed, generator
from fedpeft.tensors import Tensors, flatten, zeros_like
from fedpeft.training import decayed, shuffled_batches, train_locally


def make_update(
    site: Site, client: int, holding: Holding, release: Release, request: TrainRequest
) -> tuple[Payload, Memory]:
    """Trains and compresses, with the batches and the noise of a release.

    What stays at the client goes on from where its last answer of the run left it, and
    is trained by the same steps as what travels: under DP-SGD clipped and noised with
    it, as one vector, since later updates depend on it.

    Args:
        site: what the process keeps warm.
        client: index of the client, for what is seeded.
        holding: its records.
        release: whose draws are used; it emits nothing here.
        request: whence the training starts.

    Returns:
        What may travel once it is committed, and the client's next memory.

    Raises:
        ValueError: if a trained tensor is not finite.
    """
    memory = release.memory(request.run)
    local = memory.local or site.model.local_start
    update = _train(site, client, holding, release, request, local)
    local = local_state(site.model)
    if not flatten(local).isfinite().all():
        raise ValueError("Expected finite tensors to keep at the client, got others.")
    payload, residual = _compress(site, client, request, update, memory.residual)
    return payload, Memory(residual, local)


def _train(
    site: Site,
    client: int,
    holding: Holding,
    release: Release,
    request: TrainRequest,
    local: Tensors,
) -> Tensors:
    """Returns the update of what travels; the rest is left in the model."""
    examples, section = holding.examples, site.config.training
    template = shared_state(site.model)
    payload = Payload.from_bytes(request.state)
    seed = derive_seed(site.config.run.seed, "client", client, request.server_round)
    mask_seed = derive_seed(seed, "dropout")
    if site.plan and site.plan.is_dp_sgd:
        mask_seed = release.draws.mask_seed()
        units = examples.units(site.config.privacy.unit == "person")
        batches = release.draws.batches(units)
    else:
        rng = generator(seed, "batches")
        epochs, size = section.local_epochs, section.batch_size
        batches = shuffled_batches(len(examples), size, epochs, rng)
    update = train_locally(
        site.model,
        {**local, **COMPRESSORS["dense"]().decompress(payload, template)},
        examples,
        batches,
        engine=site.engine,
        noise=release.draws.noise,
        section=section,
        rate_factor=decayed(section, request.server_round, site.config.run.rounds),
        mask_seed=mask_seed,
        kept=holding.kept,
    )
    return {name: update[name] for name in template}


def _compress(
    site: Site,
    client: int,
    request: TrainRequest,
    update: Tensors,
    residual: Tensors,
) -> tuple[Payload, Tensors]:
    """Compresses what is already private: post-processing, free of charge."""
    seed = site.config.run.seed
    rng = generator(seed, "compression", client, request.server_round)
    if site.error_feedback is None:
        return site.compressor.compress(update, rng), {}
    return site.error_feedback.compress(update, residual or zeros_like(update), rng)


@contextlib.contextmanager
def open_randomness(site: Site, client: int, server_round: int) -> Iterator[Randomness]:
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
