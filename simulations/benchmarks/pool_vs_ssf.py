"""Two vendors' emoji inside every client: one set of scales and shifts, or a pool?

Nine classes of emoji, each sign drawn by two vendors; both drawings of a sign lie at
the same client, so that what differs is inside every client, not between clients.
Federated averaging over 5 clients, no privacy, ViT-S/14 at 56 pixels, trained in its
last layer. Three variants: SSF; a pool with random keys; a pool with keys by
k-means of the validation split, which stands for public images. The learning rate of
each is chosen on the validation split from the same list with the same seed; the figure
is accuracy on the test split, with three other seeds.

Signs, not drawings, are split, so that no test sign was seen in the other style.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedpeft.aggregation import Mean
from fedpeft.config import RunConfig
from fedpeft.data import Encoded, Splits, emoji, partition, split
from fedpeft.evaluation import evaluate
from fedpeft.features import FeatureFile, KeptFeatures, keep_features
from fedpeft.interfaces import Update
from fedpeft.model import TaskModel, build_model, load_trainable_state, trainable_state
from fedpeft.peft._pool_query import PoolQuery
from fedpeft.peft.pool_keys import fit_keys, write_keys
from fedpeft.privacy import NonPrivate
from fedpeft.seeds import generator
from fedpeft.tensors import add
from fedpeft.training import decayed, shuffled_batches, train_locally
from simulations.benchmarks.dp_step import machine

RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (1, 2, 3)
TUNING_SEED = 0
POOL_SIZE = 8

_CONFIG = """
[run]
rounds = 5
seed = {seed}
[data]
name = "emoji"
nominal_examples = 500
test_fraction = 0.25
validation_fraction = 0.15
image_size = 56
[partition]
name = "iid"
num_clients = 5
[model]
backbone = "vit-s"
task = "image-classification"
[peft]
{peft}
first_layer = 11
[training]
optimizer = "adamw"
learning_rate = {rate}
weight_decay = 0.0
decay = "linear"
batch_size = 32
[cohort]
size = 5
[privacy]
unit = "none"
"""


class BelowPools:
    """What SSF needs of what is kept for a pool: the hidden state, not the query."""

    def __init__(self, kept: KeptFeatures) -> None:
        self._kept = kept

    def of(self, indices: list[int]) -> torch.Tensor:
        """Returns hidden states ``(batch, tokens, features)``."""
        return self._kept.of(indices)[:, 1:]


@dataclass(frozen=True)
class Part:
    """Encoded examples, with what is kept of them for pools."""

    encoded: Encoded
    kept: KeptFeatures

    def kept_for(self, config: RunConfig) -> Any:
        """Returns what is kept for a run's method."""
        is_pool = config.peft.name == "ssf_pool"
        return self.kept if is_pool else BelowPools(self.kept)


@dataclass(frozen=True)
class World:
    """The data, equal for all variants and seeds."""

    clients: list[Part]
    validation: Part
    test: Part


def config_of(peft: str, rate: float, seed: int) -> RunConfig:
    """Returns one run's configuration."""
    return RunConfig.from_toml(_CONFIG.format(peft=peft, rate=rate, seed=seed))


def make_world(config: RunConfig, file: FeatureFile) -> World:
    """Reads, splits and deals the signs; what is kept does not depend on seeds."""
    examples = emoji.load()
    signs = [str(sign) for sign in range(len(examples) // len(emoji.VENDORS))]
    by_sign = replace(examples, groups=None, persons=tuple(signs * len(emoji.VENDORS)))
    splits: Splits = split(by_sign, config.data)
    model = build_model(config, len(emoji.LABELS))
    task = model.task

    def part(encoded: Encoded) -> Part:
        kept = keep_features(model, encoded, "fp32", file)
        assert kept is not None
        return Part(encoded, kept)

    train = task.encode(splits.train)
    clients = partition(splits.train, config.partition)
    return World(
        [part(train.subset(indices)) for indices in clients],
        part(task.encode(splits.validation)),
        part(task.encode(splits.test)),
    )


def run(config: RunConfig, world: World, part: Part) -> tuple[float, TaskModel]:
    """Trains and returns the accuracy on a part."""
    model = build_model(config, len(emoji.LABELS))
    engine = NonPrivate()
    engine.bind(model.module, model.operations)
    state = trainable_state(model)
    for server_round in range(1, config.run.rounds + 1):
        updates = _updates(config, world, model, engine, state, server_round)
        step, _ = Mean().aggregate(updates, {})
        state = add(state, step)
    load_trainable_state(model, state)
    metrics = evaluate(model, part.encoded, "fp32", kept=part.kept_for(config))
    line = f"{config.peft.name} {config.training.learning_rate:g} {config.run.seed}"
    print(line, metrics, file=sys.stderr, flush=True)
    return metrics["accuracy"], model


def _updates(
    config: RunConfig,
    world: World,
    model: TaskModel,
    engine: NonPrivate,
    state: dict[str, torch.Tensor],
    server_round: int,
) -> Iterable[Update]:
    section = config.training
    for number, client in enumerate(world.clients):
        rng = generator(config.run.seed, f"batches {server_round} {number}")
        size = len(client.encoded.labels)
        yield Update(
            train_locally(
                model,
                state,
                client.encoded,
                shuffled_batches(size, section.batch_size, 1.0, rng),
                engine=engine,
                noise=lambda total, _: total,
                section=section,
                rate_factor=decayed(section, server_round, config.run.rounds),
                mask_seed=0,
                kept=client.kept_for(config),
            )
        )


def spread(model: TaskModel, part: Part) -> list[float]:
    """Returns the share of each entry in what a part's examples choose."""
    query = model.module.backbone.get_submodule("pool_query")
    assert isinstance(query, PoolQuery)
    counts = torch.zeros(POOL_SIZE)
    for index in range(len(part.encoded.labels)):
        query.choose(part.kept.of([index])[:, 0])
        assert query.choice.indices is not None
        counts[query.choice.indices.flatten()] += 1
    return [round(float(share), 3) for share in counts / counts.sum()]


def measure(folder: Path) -> dict[str, object]:
    """Returns rates, accuracies, means and standard deviations of each variant."""
    world = make_world(config_of(_peft(True), 1e-3, 0), FeatureFile(1 << 30))
    public = world.validation.kept
    size = len(world.validation.encoded.labels)
    keys = fit_keys(public.of(list(range(size)))[:, 0], POOL_SIZE)
    sha256 = write_keys(keys, folder / "keys.safetensors")
    file = f'keys = "{folder / "keys.safetensors"}"\nsha256 = "{sha256}"'
    variants = {
        "ssf": _peft(False),
        "ssf_pool_random_keys": _peft(True),
        "ssf_pool_public_keys": f"{_peft(True)}\n{file}",
    }
    results: dict[str, object] = {"machine": machine("cpu", "fp32")}
    for name, peft in variants.items():
        tuned = {
            rate: run(config_of(peft, rate, TUNING_SEED), world, world.validation)[0]
            for rate in RATES
        }
        best = max(tuned, key=lambda rate: tuned[rate])
        accuracies, found, started = [], None, time.process_time()
        for seed in SEEDS:
            accuracy, found = run(config_of(peft, best, seed), world, world.test)
            accuracies.append(accuracy)
        assert found is not None
        parameters = sum(t.numel() for t in trainable_state(found).values())
        result = {
            "learning_rate": best,
            "validation_accuracy": {f"{r:g}": round(a, 4) for r, a in tuned.items()},
            "test_accuracy": [round(accuracy, 4) for accuracy in accuracies],
            "mean": round(statistics.mean(accuracies), 4),
            "standard_deviation": round(statistics.stdev(accuracies), 4),
            "trainable_parameters": parameters,
            "cpu_seconds_a_run": round((time.process_time() - started) / len(SEEDS), 1),
        }
        if name != "ssf":
            result["entry_shares_of_last_seed"] = spread(found, world.test)
        results[name] = result
        print(name, result, file=sys.stderr, flush=True)
    return results | _verdict(results)


def _verdict(results: dict[str, object]) -> dict[str, object]:
    """Says of each pool by how much it differs from SSF, and by how much by chance."""
    ssf, *pools = itertools.islice(results.items(), 1, None)
    verdict = {}
    for name, pool in pools:
        gain = pool["mean"] - ssf[1]["mean"]  # type: ignore[index]
        spreads = [of["standard_deviation"] for of in (ssf[1], pool)]  # type: ignore[index]
        verdict[name] = {
            "gain_over_ssf": round(gain, 4),
            "larger_than_spread": gain > max(spreads),
        }
    return {"verdict": verdict}


def _peft(is_pool: bool) -> str:
    if not is_pool:
        return 'name = "ssf"'
    return f'name = "ssf_pool"\npool_size = {POOL_SIZE}\ntop_k = 2'


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    print(json.dumps(result, indent=2) if given.json else result)


if __name__ == "__main__":
    main()
