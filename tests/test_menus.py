"""Variants that are possible alone, and not together."""

from pathlib import Path

import pytest

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.menus import check_variants
from fedpeft.search import Candidate
from fedpeft.sections import PeftSection
from simulations.comparison import open_comparison
from simulations.trials import refusal
from tests.helpers import SMALL, small_config

ALLOCATION = (
    'aggregation={{name="mean", server_optimizer={{name="rank_allocation", '
    "target_rank={}, final_round={}}}}}"
)
ADALORA = "peft={name='adalora', initial_rank=4, target_rank=2}"
POOL = "peft={{name='ssf_pool', counts=true, share={}}}"
WEIGHTED = "aggregation.name=pool_weighted"


def _check(*overrides: str) -> None:
    check_variants(RunConfig.from_toml(SMALL.format(path="reviews.csv"), overrides))


def test_the_two_halves_of_adalora_go_together() -> None:
    _check(ADALORA, ALLOCATION.format(2, 3))
    _check(POOL.format("['backbone.layer.pool_counts', 'head']"), WEIGHTED)
    adam = "{name='adam', learning_rate=0.1}"
    _check("peft.rank=2", f"aggregation={{name='mean', server_optimizer={adam}}}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((ADALORA,), "nothing would be allocated"),
        (("peft.rank=2", ALLOCATION.format(2, 3)), "nothing would be allocated"),
        ((ADALORA, ALLOCATION.format(1, 3)), "expected 2, as in [peft], got 1"),
        ((ADALORA, ALLOCATION.format(2, 4)), "at most 3, the [run] rounds, got 4"),
        (
            (POOL.format("['pool_scale', 'head']"), WEIGHTED),
            "expected 'pool_counts' among what travels beside [aggregation] name = "
            "'pool_weighted', which weights by it, got pool_scale, head.",
        ),
    ],
)
def test_halves_that_do_not_fit_are_one_line(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        _check(*overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_candidate_is_checked_as_the_whole_run_would_be(small_reviews: Path) -> None:
    public = "data.validation_fraction=0.2"
    config = small_config(small_reviews, public, ADALORA, ALLOCATION.format(2, 3))
    comparison = open_comparison(config)
    assert refusal(comparison, Candidate(config.peft, 1.0)) == ""
    reason = refusal(comparison, Candidate(PeftSection(name="head"), 1.0))
    assert "nothing would be allocated" in reason
