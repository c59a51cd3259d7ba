"""All menus at once: are the variants that a configuration names possible?"""

from fedpeft.aggregation import SERVER_OPTIMIZERS, RankAllocation, build_aggregator
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig, build
from fedpeft.data import PARTITIONERS
from fedpeft.errors import ConfigError
from fedpeft.peft import METHODS, AdaLora


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
    _check_ranks(config)
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
    share = config.peft.share
    travels = share is None or any("pool_counts" in part.split(".") for part in share)
    if config.aggregation.name == "pool_weighted" and not travels:
        raise ConfigError(
            "[peft] share: expected 'pool_counts' among what travels beside "
            "[aggregation] name = 'pool_weighted', which weights by it, got "
            f"{', '.join(share or ())}."
        )
    plain = training.optimizer == "sgd" and not training.momentum
    if counts and not (plain and not training.weight_decay):
        raise ConfigError(
            "[peft] counts: expected [training] optimizer = 'sgd' without momentum and "
            "weight_decay, by which counts stay counts."
        )


def _check_ranks(config: RunConfig) -> None:
    """AdaLoRA is two halves: clients train triplets, the server decides which live."""
    section = config.aggregation.server_optimizer
    allocates = section is not None and section.name == "rank_allocation"
    if allocates != (config.peft.name == "adalora"):
        raise ConfigError(
            "[peft] name: expected 'adalora' and [aggregation] server_optimizer = "
            "{name = 'rank_allocation'} together, got one of them: nothing would be "
            "allocated."
        )
    if section is None or not allocates:
        return
    method = build(METHODS, config.peft, "peft")
    rule = build(SERVER_OPTIMIZERS, section, "aggregation.server_optimizer")
    assert isinstance(method, AdaLora)
    assert isinstance(rule, RankAllocation)
    if rule.target_rank != method.target_rank:
        raise ConfigError(
            f"[aggregation.server_optimizer] target_rank: expected "
            f"{method.target_rank}, as in [peft], got {rule.target_rank}."
        )
    if rule.final_round > config.run.rounds:
        raise ConfigError(
            f"[aggregation.server_optimizer] final_round: expected at most "
            f"{config.run.rounds}, the [run] rounds, got {rule.final_round}: the ranks "
            "would not come down to target_rank."
        )
