"""What the server does with a round's updates: one rule a file, and the menus.

A rule (:data:`AGGREGATORS`) turns the updates into one. A server optimiser
(:data:`SERVER_OPTIMIZERS`) turns the round's result into the step that is taken, with
what it remembers of earlier rounds. :func:`build_aggregator` puts them together.
"""

from fedpeft.aggregation.mean import Mean
from fedpeft.aggregation.optimized import Optimized
from fedpeft.aggregation.pool_weighted import PoolWeighted
from fedpeft.aggregation.rank_allocation import RankAllocation
from fedpeft.aggregation.server_optimizers import (
    ServerAdam,
    ServerMomentum,
    ServerOptimizer,
    ServerSGD,
)
from fedpeft.config import build
from fedpeft.interfaces import Aggregator
from fedpeft.sections import AggregationSection

AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": Mean,
    "pool_weighted": PoolWeighted,
}

SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = {
    "sgd": ServerSGD,
    "momentum": ServerMomentum,
    "adam": ServerAdam,
    "rank_allocation": RankAllocation,
}


def build_aggregator(
    section: AggregationSection, rule: Aggregator | None = None
) -> Aggregator:
    """Returns the rule that ``[aggregation]`` names, with its optimiser if it has one.

    Args:
        section: as read.
        rule: takes the named one's place: a mean with noise.

    Raises:
        ConfigError: for an unknown name or key, or a value that is refused.

    Example:
        >>> build_aggregator(AggregationSection(name="mean"))
        Mean(weighting='uniform')
    """
    rule = rule or build(AGGREGATORS, section, "aggregation")
    if section.server_optimizer is None:
        return rule
    name = "aggregation.server_optimizer"
    return Optimized(rule, build(SERVER_OPTIMIZERS, section.server_optimizer, name))


__all__ = [
    "AGGREGATORS",
    "SERVER_OPTIMIZERS",
    "Mean",
    "Optimized",
    "PoolWeighted",
    "RankAllocation",
    "ServerAdam",
    "ServerMomentum",
    "ServerOptimizer",
    "ServerSGD",
    "build_aggregator",
]
