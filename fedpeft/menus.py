"""All menus at once: are the variants that a configuration names possible?"""

from fedpeft.aggregation import build_aggregator
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig, build
from fedpeft.data import PARTITIONERS
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
