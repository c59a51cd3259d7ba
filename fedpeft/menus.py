"""All menus at once: are the variants that a configuration names possible?"""

from fedpeft.aggregation import build_aggregator
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig, build
from fedpeft.data import PARTITIONERS
from fedpeft.errors import ConfigError
from fedpeft.peft import METHODS


def check_variants(config: RunConfig) -> None:
    """Builds every variant once, before anything is loaded or written.

    Raises:
        ConfigError: for an unknown name or key, or a value that a variant refuses.
    """
    build(PARTITIONERS, config.partition, "partition")
    build(METHODS, config.peft, "peft")
    build(COMPRESSORS, config.compression, "compression")
    build_aggregator(config.aggregation)
    _check_counts(config)
    if config.peft.name == "ssf_pool" and config.model.task == "causal-lm":
        raise ConfigError(
            "[peft] name: expected a method that does not choose by the whole text "
            "beside causal-lm, got ssf_pool: a completion would take part in choosing "
            "what predicts it; choose ssf."
        )


def _check_counts(config: RunConfig) -> None:
    """Counts of a pool's entries are told in updates of plain SGD alone."""
    training, counts = config.training, bool(config.peft.options.get("counts"))
    if config.aggregation.name == "pool_weighted" and not counts:
        raise ConfigError(
            "[aggregation] name: expected [peft] name = 'ssf_pool' and counts = true "
            "beside 'pool_weighted', which weights by them."
        )
    plain = training.optimizer == "sgd" and not training.momentum
    if counts and not (plain and not training.weight_decay):
        raise ConfigError(
            "[peft] counts: expected [training] optimizer = 'sgd' without momentum and "
            "weight_decay, by which counts stay counts."
        )
