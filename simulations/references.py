"""Reference models: runs like the real one, on halves of public records.

Only adapters are trained, from the real run's own start, so that each costs little, and
what the frozen part of the model gives for a record is computed once for all of them.
Sampling, clipping, noise, compression and the server's rule are those of the run; the
records are dealt evenly.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch

from client.site import Site, assemble
from fedpeft.aggregation import build_aggregator
from fedpeft.attacks.attack import Knowledge
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.errors import ConfigError, RunError
from fedpeft.interfaces import Update
from fedpeft.model import build_model, shared_state
from fedpeft.privacy import SeededRandomness, make_plan
from fedpeft.privacy.draws import Draws
from fedpeft.seeds import derive_seed, generator
from fedpeft.tensors import Tensors, add, flatten, scale, zeros_like
from fedpeft.training import decayed, shuffled_batches, train_locally
from server.cohort import drawn, rotation
from server.setup import private_rule


def with_references(
    knowledge: Knowledge, num_labels: int, *, number: int = 8, size: int | None = None
) -> Knowledge:
    """Gives an adversary reference models.

    They come in pairs, the second on what the first was not trained on: so half of them
    have not seen a record.

    Args:
        knowledge: with a surrogate; its configuration is what they are trained by.
        num_labels: of the task.
        number: of models, even.
        size: records of each; None for as many as the run's clients hold by their
            nominal number, and at most half of the surrogate.

    Raises:
        ConfigError: if something stays at the clients, which the released model lacks.
        RunError: for an odd number, too few public records, or if training diverges.
    """
    config, surrogate = knowledge.config, knowledge.surrogate
    if config.peft.share is not None:
        raise ConfigError(
            "[peft] share: expected none for reference models, which are compared as "
            "a whole: leave shadow_membership out."
        )
    if surrogate is None or number < 2 or number % 2:
        raise RunError(
            f"Expected public records and an even number of models, got {number}."
        )
    halves = list(_halves(config, len(surrogate), number, size))
    site = _site(config, surrogate, num_labels)
    members = torch.zeros(number, len(surrogate), dtype=torch.bool)
    start, states = shared_state(site.model), []
    for index, half in enumerate(halves):
        members[index, half] = True
        states.append(train_reference(site, start, half, index))
    return dataclasses.replace(
        knowledge, references=tuple(states), reference_members=members
    )


def _halves(
    config: RunConfig, records: int, number: int, size: int | None
) -> Iterator[list[int]]:
    """Yields each model's records: pair by pair two halves of the same ones.

    Raises:
        RunError: if there is not one for each client.
    """
    clients, nominal = config.partition.num_clients, config.data.nominal_examples
    wanted = size or (nominal * clients if nominal else records)
    half = min(wanted, records // 2)
    if half < clients:
        raise RunError(
            f"Expected {2 * clients} public records or more, got {records}: each of "
            "the run's clients takes one."
        )
    for pair in range(number // 2):
        rng = generator(config.run.seed, "references", pair)
        order = torch.randperm(2 * half, generator=rng).tolist()
        yield order[:half]
        yield order[half:]


def _site(config: RunConfig, surrogate: Encoded, num_labels: int) -> Site:
    """Builds a model of its own: an engine changes the one that it is bound to."""
    plan, model = make_plan(config), build_model(config, num_labels)
    return assemble(config, plan, model, {"public": surrogate}, is_own=True)


def train_reference(
    site: Site, start: Tensors, records: Sequence[int], index: int
) -> Tensors:
    """Runs all rounds over some of a site's records and returns the final model.

    Args:
        site: with one holding of public records.
        start: the state before the first round.
        records: positions of those that are trained on, dealt to clients in turn.
        index: of the model, for what is drawn.

    Raises:
        RunError: if an update is not finite.
    """
    config, plan = site.config, site.plan
    seed = derive_seed(config.run.seed, "reference", index)
    own = config.model_copy(
        update={"run": config.run.model_copy(update={"seed": seed})}
    )
    clients = config.partition.num_clients
    parts = [list(records[client::clients]) for client in range(clients)]
    aggregator = build_aggregator(config.aggregation, private_rule(own, plan))
    state, memory = start, aggregator.init(start)
    residuals = [zeros_like(start) for _ in parts]
    tail, last = zeros_like(start), min(config.run.average_last, config.run.rounds)
    for server_round in range(1, config.run.rounds + 1):
        updates = []
        for client in _cohort(own, server_round):
            turn = derive_seed(seed, "turn", client, server_round)
            update = _train(site, state, parts[client], server_round, turn)
            if not flatten(update).isfinite().all():
                raise RunError(
                    "Expected finite updates of reference models, got others: their "
                    "training diverged."
                )
            sent, residuals[client] = _sent(site, update, residuals[client], turn)
            updates.append(Update(sent, len(parts[client])))
        step, memory = aggregator.aggregate(updates, memory)
        state = add(state, step)
        if server_round > config.run.rounds - last:
            tail = add(tail, state)
    return scale(tail, 1 / last)


def _cohort(config: RunConfig, server_round: int) -> list[int]:
    cohort = config.cohort
    if cohort.sampling == "rotation":
        return rotation(server_round, cohort.size, config.partition.num_clients)
    seed = derive_seed(config.run.seed, "cohort", server_round)
    return drawn(config, SeededRandomness(seed))


def _train(
    site: Site, state: Tensors, part: list[int], server_round: int, seed: int
) -> Tensors:
    """Returns one client's update, trained as a client trains."""
    config, section = site.config, site.config.training
    (holding,) = site.holdings
    draws = Draws(site.plan, SeededRandomness(derive_seed(seed, "noise")))
    batches: Iterable[list[list[int]]]
    if site.plan is not None and site.plan.is_dp_sgd:
        by_person = config.privacy.unit == "person"
        batches = draws.batches(_units(holding.examples, part, by_person))
    else:
        rng = generator(seed, "batches")
        epochs, size = section.local_epochs, section.batch_size
        batches = (
            [[part[index]] for (index,) in batch]
            for batch in shuffled_batches(len(part), size, epochs, rng)
        )
    return train_locally(
        site.model,
        state,
        holding.examples,
        batches,
        engine=site.engine,
        noise=draws.noise,
        section=section,
        rate_factor=decayed(section, server_round, config.run.rounds),
        mask_seed=derive_seed(seed, "dropout"),
        kept=holding.kept,
    )


def _units(examples: Encoded, part: list[int], by_person: bool) -> list[list[int]]:
    """Returns a part's units of privacy, as positions among all examples."""
    units = examples.subset(part).units(by_person and examples.persons is not None)
    return [[part[index] for index in unit] for unit in units]


def _sent(
    site: Site, update: Tensors, residual: Tensors, seed: int
) -> tuple[Tensors, Tensors]:
    """Returns what arrives of an update, and the client's next residual."""
    rng = generator(seed, "compression")
    if site.error_feedback is None:
        payload = site.compressor.compress(update, rng)
    else:
        payload, residual = site.error_feedback.compress(update, residual, rng)
    return site.compressor.decompress(payload, update), residual
