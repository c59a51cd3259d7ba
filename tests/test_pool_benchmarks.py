"""The benchmarks of pools, cache and side: their own machinery, on tiny models."""

import pytest
import torch

from fedpeft.peft import Head, Side, SSFPool
from simulations.benchmarks import cache, pool_vs_ssf, pools
from tests.helpers import toy
from tests.test_features import examples_of, model_of


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "BATCH", 4)
    monkeypatch.setattr(pools, "SIZE", 32)
    monkeypatch.setattr(pools, "LABELS", 3)


def make_bench(first_layer: int) -> pools.Bench:
    method = SSFPool(pool_size=3, top_k=2, first_layer=first_layer)
    return pools.make_bench(toy(method, family="vit").model, "cpu")


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("first_layer", [0, 1])
def test_all_ways_through_a_pool_are_timed_and_equal(first_layer: int) -> None:
    found = pools.measure(make_bench(first_layer), 1, "cpu")
    assert list(found)[-3:] == ["speed_up", "speed_up_of_batch", "speed_up_of_cache"]
    assert all(value >= 0 for value in found.values())


@pytest.mark.usefixtures("_tiny")
def test_a_way_with_another_gradient_is_an_error(monkeypatch) -> None:
    bench = make_bench(0)
    bench.kept.neg_()  # the queries point elsewhere
    with pytest.raises(ValueError, match="at_once_kept is off by"):
        pools.measure(bench, 1, "cpu")


@pytest.mark.parametrize("method", [Head(), Side()], ids=["head", "side"])
def test_epochs_from_the_cache_have_the_same_losses(method) -> None:
    bench = cache.Bench(model_of("bert", method), examples_of("bert"))
    found = cache.times(bench, 1)
    assert found["largest_difference_of_losses"] < 1e-5


def test_a_cache_of_something_else_is_an_error(monkeypatch) -> None:
    bench = cache.Bench(model_of("bert", Head()), examples_of("bert"))
    of = cache.KeptFeatures.of
    monkeypatch.setattr(
        cache.KeptFeatures, "of", lambda self, indices: 1 + of(self, indices)
    )
    with pytest.raises(ValueError, match="Expected equal losses"):
        cache.times(bench, 1)


@pytest.mark.parametrize("is_pool", [True, False])
def test_the_experiments_configuration_is_valid(is_pool: bool) -> None:
    config = pool_vs_ssf.config_of(pool_vs_ssf._peft(is_pool), 0.1, 3)
    assert config.peft.name == ("ssf_pool" if is_pool else "ssf")
    assert (config.training.learning_rate, config.run.seed) == (0.1, 3)


def test_a_gain_counts_where_it_is_larger_than_both_spreads() -> None:
    def result(mean: float, deviation: float) -> dict[str, float]:
        return {"mean": mean, "standard_deviation": deviation}

    verdict = pool_vs_ssf._verdict(
        {
            "machine": {},
            "ssf": result(0.5, 0.03),
            "a": result(0.52, 0.01),
            "b": result(0.55, 0.04),
        }
    )
    assert verdict == {
        "verdict": {
            "a": {"gain_over_ssf": 0.02, "larger_than_spread": False},
            "b": {"gain_over_ssf": 0.05, "larger_than_spread": True},
        }
    }


def test_what_ssf_needs_is_what_pools_keep_without_the_query() -> None:
    kept = cache.Bench(
        model_of("bert", SSFPool(pool_size=3, first_layer=1)), examples_of("bert")
    ).kept()
    both = kept.of([0, 2])
    assert torch.equal(pool_vs_ssf.BelowPools(kept).of([0, 2]), both[:, 1:])
