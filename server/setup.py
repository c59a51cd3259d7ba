"""Builds what the round loop needs and does not change."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedpeft.aggregation import build_aggregator
from fedpeft.audit.recording import Recorder
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig, build
from fedpeft.data import Encoded, Examples, check_classes, load, split
from fedpeft.errors import ConfigError, RunError
from fedpeft.features import KeptFeatures, feature_file, keep_features
from fedpeft.interfaces import Aggregator, Compressor
from fedpeft.keys import seal
from fedpeft.model import TaskModel, build_model
from fedpeft.privacy import (
    AdaptiveNorm,
    Banded,
    Plan,
    PrivateMean,
    Randomness,
    SecureRandomness,
    SeededRandomness,
    make_plan,
)
from fedpeft.seeds import derive_seed
from server.cohort import SecretFile
from server.runtime import SIMULATION, Runtime
from server.standing import Standing


@dataclass(frozen=True)
class Server:
    """What the loop needs and does not change.

    Attributes:
        run: the run's id.
        held_out: the server's own public data, on which every model is judged.
        output: the run directory.
        randomness: where a round's secret cohort comes from, by its number.
        runtime: what is known of where it runs.
    """

    run: str
    config: RunConfig
    plan: Plan | None
    model: TaskModel
    aggregator: Aggregator
    compressor: Compressor
    held_out: Encoded
    output: Path
    randomness: Callable[[int], Randomness]
    runtime: Runtime = SIMULATION

    @property
    def hides_clients(self) -> bool:
        """Whether who answered, and how many, is nobody else's business."""
        return self.plan is not None and not self.plan.is_dp_sgd

    @cached_property
    def standing(self) -> Standing:
        """How the clients have fared; for runs that hide none."""
        return Standing(self.output / "server" / "standing.json")

    @cached_property
    def kept(self) -> KeptFeatures | None:
        """The frozen features of the held-out data."""
        training = self.config.training
        file = feature_file(training)
        return keep_features(self.model, self.held_out, training.precision, file)

    @cached_property
    def recorder(self) -> Recorder | None:
        """Keeps what comes and goes for the auditor, where one is named."""
        audit = self.config.audit
        agreed = audit.auditor if audit.record else None
        auditor = self.runtime.auditor or agreed
        return None if auditor is None else Recorder(self.output, self.run, auditor)

    @property
    def secrets(self) -> SecretFile:
        """What stays with the server."""
        return SecretFile(self.output / "server" / "secrets.jsonl")


def open_server(
    config: RunConfig, output: Path, runtime: Runtime = SIMULATION
) -> Server:
    """Builds everything that the loop needs.

    Raises:
        RunError: if the configuration has no run id.
        ConfigError: if it does not say which classes the held-out file has, or names an
            auditor's key that is none.
    """
    if config.run.id is None:
        raise RunError("Expected a resolved configuration with [run] id.")
    if config.audit.record and config.audit.auditor is not None:
        seal(b"", config.audit.auditor, "")  # a key that is none must cost no round
    judged_on = _held_out(config, runtime.held_out)
    model = build_model(config, len(judged_on.label_names))
    plan = make_plan(config)
    return Server(
        run=config.run.id,
        config=config,
        plan=plan,
        model=model,
        aggregator=build_aggregator(config.aggregation, private_rule(config, plan)),
        compressor=build(COMPRESSORS, config.compression, "compression"),
        held_out=model.task.encode(judged_on),
        output=output,
        randomness=_randomness(config, "cohort"),
        runtime=runtime,
    )


def _held_out(config: RunConfig, path: Path | None) -> Examples:
    """Returns the public examples on which models are judged."""
    data = config.data
    if path is not None:
        if data.labels is None and data.completion is None:
            raise ConfigError(
                "[data] labels: expected the classes in the scenario beside a held_out "
                "file, got none: they are never read from the data."
            )
        # All of it: max_examples cuts what clients share out.
        changes = {"name": None, "path": str(path), "max_examples": None}
        judged_on = load(data.model_copy(update=changes))
    else:
        splits = split(load(data), data)
        on_test = config.run.evaluate_on == "test"
        judged_on = splits.test if on_test else splits.validation
    check_classes(judged_on)
    return judged_on


def private_rule(config: RunConfig, plan: Plan | None) -> PrivateMean | None:
    """Returns the mean that clips and noises, where the server owes privacy."""
    if plan is None or plan.is_dp_sgd:
        return None
    norm, adaptive = None, config.privacy.adaptive_clipping
    if adaptive is not None and plan.count_noise is not None:
        norm = AdaptiveNorm(adaptive.quantile, adaptive.learning_rate, plan.count_noise)
    return PrivateMean(
        plan.clipping_norm,
        plan.noise_multiplier,
        plan.nominal_batch,
        _randomness(config, "noise"),
        adaptive=norm,
        banded=Banded(config.run.rounds, plan.bands) if plan.bands else None,
    )


def _randomness(config: RunConfig, purpose: str) -> Callable[[int], Randomness]:
    """Returns where the server's draws of a round come from."""

    def of_round(server_round: int) -> Randomness:
        if config.privacy.noise == "secure":
            return SecureRandomness()
        key = (purpose, config.hash, server_round)
        return SeededRandomness(derive_seed(config.run.seed, "server", *key))

    return of_round
