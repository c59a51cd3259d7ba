"""A client's update: trained on its records, made private, compressed."""

import contextlib
from collections.abc import Iterator

from client.holding import Holding
from client.messages import TrainRequest
from client.site import Site
from fedpeft.compression import COMPRESSORS
from fedpeft.interfaces import Payload
from fedpeft.model import trainable_state
from fedpeft.privacy import (
    Randomness,
    Release,
    SecureRandomness,
    SeededRandomness,
    noise_ahead,
)
from fedpeft.seeds import derive_seed, generator
from fedpeft.tensors import Tensors, zeros_like
from fedpeft.training import decayed, shuffled_batches, train_locally


def make_update(
    site: Site, client: int, holding: Holding, release: Release, request: TrainRequest
) -> tuple[Payload, Tensors]:
    """Trains and compresses, with the batches and the noise of a release.

    Args:
        site: what the process keeps warm.
        client: index of the client, for what is seeded.
        holding: its records.
        release: whose draws are used; it emits nothing here.
        request: whence the training starts.

    Returns:
        What may travel once it is committed, and the next error-feedback memory.
    """
    update = _train(site, client, holding, release, request)
    return _compress(site, client, release, request, update)


def _train(
    site: Site, client: int, holding: Holding, release: Release, request: TrainRequest
) -> Tensors:
    examples, section = holding.examples, site.config.training
    template = trainable_state(site.model)
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
