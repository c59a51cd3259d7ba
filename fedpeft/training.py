"""One client's local training in a round, under any privacy engine."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fedpeft.data import Encoded, physical_batches
from fedpeft.features import KeptFeatures, autocast
from fedpeft.interfaces import NoiseFn, PrivacyEngine
from fedpeft.model import TaskModel, load_trainable_state, trainable_state
from fedpeft.sections import TrainingSection
from fedpeft.tensors import Tensors, subtract


def train_locally(
    model: TaskModel,
    state: Tensors,
    examples: Encoded,
    batches: Iterable[list[list[int]]],
    *,
    engine: PrivacyEngine,
    noise: NoiseFn,
    section: TrainingSection,
    rate_factor: float,
    mask_seed: int,
    kept: KeptFeatures | None = None,
) -> Tensors:
    """Trains from the server's state and returns the update: local minus global.

    Args:
        model: any trainable state; it is overwritten.
        state: the server's trainable state.
        examples: the client's own.
        batches: one list of units a local step, each a list of indices of examples;
            a unit is clipped as one. An empty batch is a step too.
        engine: bound to the model.
        noise: what the engine's step adds.
        section: optimiser, precision, physical batch size.
        rate_factor: on the section's learning rates, see :func:`decayed`.
        mask_seed: of the dropout masks; under privacy it must be secret, see
            ``Draws.mask_seed``.
        kept: what the frozen part of the model gave for these examples in the past.
    """
    load_trainable_state(model, state)
    engine.reset()
    model.module.train(section.dropout)
    optimizer = _optimizer(model, section, rate_factor)
    with torch.random.fork_rng():
        torch.manual_seed(mask_seed)
        for batch in batches:
            optimizer.zero_grad()
            for part in physical_batches(examples, batch, section.max_physical_batch):
                indices = [index for unit in part for index in unit]
                losses = example_losses(model, examples, indices, section, kept)
                engine.accumulate(losses, _owners(part))
            engine.step(noise)
            optimizer.step()
    return subtract(trainable_state(model), state)


def _owners(units: list[list[int]]) -> torch.Tensor | None:
    """Returns each example's unit by its place, None if each is its own."""
    if all(len(unit) == 1 for unit in units):
        return None
    return torch.tensor([place for place, unit in enumerate(units) for _ in unit])


def example_losses(
    model: TaskModel,
    examples: Encoded,
    indices: list[int],
    section: TrainingSection,
    kept: KeptFeatures | None = None,
) -> torch.Tensor:
    """Returns one loss an example, shape ``(batch,)``, in fp32."""
    batch = model.task.collate(examples, indices).to(model.device)
    with autocast(model.device, section.precision):
        features = kept.of(indices) if kept else None
        return model.task.losses(model.module, batch, features)


def shuffled_batches(
    num_examples: int, batch_size: int, local_epochs: float, rng: torch.Generator
) -> Iterator[list[list[int]]]:
    """Yields the mini-batches of plain training: pass after pass in random order.

    Each example is a unit of its own.

    The last batch of a pass may be smaller; a fraction of a pass is rounded to the
    nearest number of batches, at least one.
    """
    batch_size = min(batch_size, num_examples)
    a_pass = -(-num_examples // batch_size)
    steps = max(1, round(local_epochs * a_pass))
    while steps > 0:
        order = torch.randperm(num_examples, generator=rng).tolist()
        for start in range(0, num_examples, batch_size)[:steps]:
            yield [[index] for index in order[start : start + batch_size]]
        steps -= a_pass


def decayed(section: TrainingSection, server_round: int, rounds: int) -> float:
    """Returns the factor on the learning rates in a round, from 1.

    >>> section = TrainingSection(learning_rate=1.0, batch_size=1, decay="linear")
    >>> [decayed(section, server_round, 4) for server_round in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    return 1 - (server_round - 1) / rounds if section.decay == "linear" else 1.0


def _optimizer(
    model: TaskModel, section: TrainingSection, rate_factor: float
) -> torch.optim.Optimizer:
    head = {
        id(p) for op in model.module.head_operations for p in op.module.parameters()
    }
    trainable = [p for p in model.module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if id(p) not in head]},
        {
            "params": [p for p in trainable if id(p) in head],
            "lr": rate_factor * (section.head_learning_rate or section.learning_rate),
        },
    ]
    if section.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=rate_factor * section.learning_rate,
            momentum=section.momentum,
            weight_decay=section.weight_decay,
        )
    return torch.optim.AdamW(
        groups,
        lr=rate_factor * section.learning_rate,
        weight_decay=section.weight_decay,
    )
