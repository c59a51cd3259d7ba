"""Canaries against a mechanism: what a correct one shows, and what refutes a claim."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.audit.canaries import (
    as_examples,
    canary_model,
    spread_direction,
    tensor_sizes,
)
from fedpeft.audit.trials import (
    FAMILY_ALPHA,
    dp_trials,
    hiding_check,
    ledger_checks,
    mislabelled,
    steps,
)
from fedpeft.audit.trials.checks import noise_check
from fedpeft.audit.trials.deciding import claimed_curve, decide_pair, decide_run
from fedpeft.audit.trials.mechanisms import LocalSteps, ServerRounds
from fedpeft.audit.trials.pairs import Pair, pairs, physical_batch
from fedpeft.audit.trials.samples import sample_runs
from fedpeft.audit.trials.whole_run import Coins
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.model import TaskModel
from fedpeft.oracle import loop_gradients
from fedpeft.peft import Lora
from fedpeft.privacy import (
    Composition,
    DpSgd,
    Plan,
    Randomness,
    SeededRandomness,
    draws,
    engine,
    randomness,
)
from fedpeft.privacy.ledger import Entry, Ledger
from fedpeft.privacy.plan import make_plan
from fedpeft.privacy.rows import Rows
from tests.helpers import small_config, toy
from tests.test_training import _examples, _task

SIZES = {"a": 16, "b": 4, "head": 4}
UNITS = {
    "example": (),
    "person": ("privacy.unit=person", "data.person=film", "data.nominal_persons=48"),
    "client": ("privacy.unit=client",),
}


def _config(unit: str, *overrides: str) -> RunConfig:
    return small_config(Path("reviews.csv"), *UNITS[unit], *overrides)


def _plan(unit: str, *overrides: str) -> Plan:
    plan = make_plan(_config(unit, *overrides))
    assert plan is not None
    return plan


@dataclasses.dataclass(frozen=True)
class Silence(Randomness):
    """No noise, and everybody is drawn."""

    def uniform(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)

    def gaussian(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)


def _mechanism(unit: str, pair: Pair) -> LocalSteps | ServerRounds:
    plan = _plan(unit)
    if unit == "client":
        return ServerRounds(plan, SIZES, rounds=2)
    claim = pair.claim(plan)
    changed = dataclasses.replace(
        plan,
        noise_multiplier=claim.noise_multiplier,
        sampling_rate=claim.sampling_rate,
        local_steps=2,
    )
    return LocalSteps.of(_config(unit), changed, SIZES, physical_batch(plan))


def _pairs() -> list[tuple[str, Pair]]:
    direction = spread_direction(SIZES)
    return [(unit, pair) for unit in UNITS for pair in pairs(_plan(unit), direction)]


@pytest.mark.parametrize(
    ("unit", "pair"), _pairs(), ids=lambda p: getattr(p, "trial", p)
)
def test_without_noise_a_canary_moves_a_correct_sum_by_one_norm_at_most(
    unit: str, pair: Pair
) -> None:
    plan, mechanism = _plan(unit), _mechanism(unit, pair)
    without, with_canary = (
        pair.scores(mechanism.sums(*pair.rows(side), Silence()), plan)
        for side in (False, True)
    )
    if pair.of_silence:
        assert without.tolist() == [0, 0]
        assert with_canary.tolist() == [1, 1]
        return
    one = 1 / pair.claim(plan).noise_multiplier
    assert without.tolist() == pytest.approx([0, 0], abs=5e-3)
    moved = 0.0 if pair.trial == "not a number" else one
    assert with_canary.tolist() == pytest.approx([moved] * 2, abs=5e-3)
    assert pair.threshold(plan) == one / 2


def test_a_canary_is_its_own_gradient_in_every_tensor() -> None:
    model = canary_model(SIZES)
    rows = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    losses = model.task.losses(
        model.module, model.task.collate(as_examples(rows), [0, 1, 2])
    )
    expected = loop_gradients(losses, list(model.module.parameters()))
    assert torch.equal(expected, rows)
    dp_sgd = DpSgd(1.0, 0.0, nominal_batch=1)
    dp_sgd.bind(model.module, model.operations)
    batch = model.task.collate(as_examples(rows), [0, 1, 2])
    losses = model.task.losses(model.module, batch)
    assert torch.equal(dp_sgd.per_sample_gradients(losses), rows)


def _model() -> TaskModel:
    return _task(toy(Lora(rank=2)))


def test_the_canary_model_has_the_tensors_of_the_run_scaled_down() -> None:
    model = _model()
    own = tensor_sizes(model, most=10**6)
    assert own == {
        name: p.numel()
        for name, p in model.module.named_parameters()
        if p.requires_grad
    }
    small = tensor_sizes(model, most=40)
    assert list(small) == list(own)
    assert min(small.values()) == 1
    assert sum(small.values()) <= 40 + len(own)
    few = tensor_sizes(model, most=40, tensors=3)
    assert len(few) == 3
    assert list(few)[-1] == list(own)[-1]


@pytest.mark.parametrize("unit", UNITS)
def test_a_correct_implementation_is_not_refuted(unit: str, monkeypatch) -> None:
    monkeypatch.setattr(steps, "_LEAST_CALLS", 2)
    trials, checks = dp_trials(_config(unit), _model(), seconds=0.0, seed=0)
    assert not [trial.trial for trial in trials if trial.falsified]
    assert {check.status for check in checks} <= {"ok", "unknown"}
    assert sum(trial.bounds[0].alpha for trial in trials) <= FAMILY_ALPHA * 1.000001
    assert all(trial.bounds[0].epsilon <= trial.epsilon_upper for trial in trials)


def test_without_a_claim_there_is_nothing_to_try() -> None:
    config = small_config(Path("reviews.csv"), "privacy.unit=none")
    assert dp_trials(config, _model(), seconds=1.0) == ([], [])


def test_the_worst_correct_mechanism_is_refuted_as_rarely_as_promised() -> None:
    rng = np.random.default_rng(0)
    claim = Composition(noise_multiplier=1.0, sampling_rate=1.0, steps=1)
    refuted = 0
    for _ in range(300):
        scores = rng.normal(1.0, 1.0, 400), rng.normal(0.0, 1.0, 400)
        trial = decide_pair(
            "t", "x", scores, threshold=0.5, claim=claim, delta=1e-5, alpha=0.05
        )
        refuted += trial.falsified
    # At most 15 are expected; 30 or more have a probability below 1e-3.
    assert refuted < 30


@pytest.mark.parametrize(("factor", "is_found"), [(1.0, False), (2 / 3, True)])
def test_two_thirds_of_the_noise_are_found_and_all_of_it_is_not(
    factor: float, is_found: bool
) -> None:
    rng = np.random.default_rng(0)
    claim = Composition(noise_multiplier=1.0, sampling_rate=1.0, steps=1)
    scores = rng.normal(1.0, factor, 4000), rng.normal(0.0, factor, 4000)
    trial = decide_pair(
        "t", "x", scores, threshold=0.5, claim=claim, delta=1e-5, alpha=1e-4
    )
    assert trial.falsified == is_found
    assert (trial.bounds[0].epsilon > trial.epsilon_upper) == is_found


def test_the_claimed_curve_of_a_sampled_step_lies_above_the_whole_ones() -> None:
    whole = claimed_curve(Composition(1.0, 1.0, 1))
    sampled = claimed_curve(Composition(1.0, 0.25, 1))
    assert all(sampled(error) > whole(error) for error in (0.01, 0.1, 0.5))


def test_a_run_that_tells_every_coin_is_refuted_and_one_that_tells_none_is_not() -> (
    None
):
    coins = Coins.flip(seed=0, client=0, canaries=400, total=4).included.numpy()
    level = {
        "client": 0,
        "server_round": 1,
        "claim": Composition(4.0, 1.0, 1),
        "delta": 1e-5,
        "alpha": 1e-4,
    }
    told = decide_run("t", "x", coins.astype(float), coins, **level)
    assert told.falsified
    blind = np.random.default_rng(0).normal(size=400)
    assert not decide_run("t", "x", blind, coins, **level).falsified


def _is_refuted(monkeypatch, trial: str, unit: str = "example") -> bool:
    """Runs one of the trials, 200 times with the canary and as often without."""

    def this_one(plan: Plan, direction: torch.Tensor) -> list[Pair]:
        return [pair for pair in pairs(plan, direction) if pair.trial == trial]

    monkeypatch.setattr(steps, "pairs", this_one)
    config = _config(unit, "training.batch_size=12")
    (found,) = steps.step_trials(
        config, make_plan(config), SIZES, seconds=0.0, seed=0, alpha=1e-4
    )
    return found.falsified


def test_a_step_that_clips_nothing_is_refuted(monkeypatch) -> None:
    assert not _is_refuted(monkeypatch, "gradient canary")
    monkeypatch.setattr(Rows, "clipped_sum", lambda rows, _: rows.dense().sum(0))
    assert _is_refuted(monkeypatch, "gradient canary")


def test_noise_of_a_fifth_is_refuted(monkeypatch) -> None:
    whole = randomness.noised
    monkeypatch.setattr(draws, "noised", lambda total, s, r: whole(total, s / 5, r))
    assert _is_refuted(monkeypatch, "gradient canary")


def test_a_persons_rows_taken_one_by_one_are_refuted(monkeypatch) -> None:
    assert not _is_refuted(monkeypatch, "a person of many rows", "person")
    monkeypatch.setattr(engine, "summed_by", lambda owners, rows: rows)
    assert _is_refuted(monkeypatch, "a person of many rows", "person")


def test_a_persons_rows_that_make_an_answer_fail_are_refuted(monkeypatch) -> None:
    monkeypatch.setattr(draws, "sample", lambda rows, most, source: list(rows))
    assert _is_refuted(monkeypatch, "a person of many rows", "person")


def test_batches_at_another_rate_are_refuted(monkeypatch) -> None:
    assert not _is_refuted(monkeypatch, "sampling")
    drawn = randomness.poisson_batch
    monkeypatch.setattr(draws, "poisson_batch", lambda n, rate, r: drawn(n, 0.75, r))
    assert _is_refuted(monkeypatch, "sampling")


def test_a_client_that_always_fails_is_an_error_and_no_finding(monkeypatch) -> None:
    monkeypatch.setattr(draws, "noised", lambda total, s, r: None)
    with pytest.raises(ValueError, match="with and without them"):
        _is_refuted(monkeypatch, "flip")


def test_answers_that_share_noise_are_found() -> None:
    assert noise_check(SeededRandomness(1), SeededRandomness(2)).status == "ok"
    shared = noise_check(SeededRandomness(1), SeededRandomness(1))
    assert (shared.status, shared.falsifies) == ("failed", True)


def _entry(nonce: str) -> Entry:
    return Entry(
        *("run", 1, "clinic", "example", "add-or-remove-one", "gaussian"),
        *(1.0, 0.25, 4, 1.0, "backbone", "plan", "request", "payload"),
        nonce=nonce,
    )


def _failing(ledger: Ledger, answers: int) -> list[str]:
    checks = ledger_checks(ledger, answers=answers, delta=1e-5)
    assert all(check.falsifies == (check.status == "failed") for check in checks)
    return [check.check for check in checks if check.status == "failed"]


def test_a_ledger_is_compared_with_the_answers_and_with_itself(monkeypatch) -> None:
    ledger = Ledger(Path("nowhere"), "clinic", [_entry("0" * 32), _entry("1" * 32)])
    assert _failing(ledger, answers=2) == []
    assert _failing(ledger, answers=3) == ["ledger of clinic: every answer is charged"]
    monkeypatch.setattr(Ledger, "spent", lambda ledger, delta: 1.0)
    assert _failing(ledger, answers=2) == [
        "ledger of clinic: all entries are accounted together"
    ]
    monkeypatch.undo()
    told = Ledger(Path("nowhere"), "clinic", [_entry(""), _entry("1" * 32)])
    assert _failing(told, answers=2) == [
        "ledger of clinic: what is acknowledged cannot be computed"
    ]


def test_cohorts_that_are_told_of_are_found() -> None:
    assert hiding_check([{"round": 1, "cohort_size": None}]).status == "ok"
    told = hiding_check([{"round": 1, "cohort_size": 3}])
    assert (told.status, told.falsifies) == ("failed", True)


def _private_examples() -> Encoded:
    examples = mislabelled(_examples(24), num_labels=3)
    return dataclasses.replace(examples, persons=None)


def test_a_wrong_label_is_wrong_for_every_kind_of_label() -> None:
    one = mislabelled(Encoded([torch.ones(1)] * 2, torch.tensor([0, 2])), num_labels=3)
    assert one.labels.tolist() == [1, 0]
    several = Encoded([torch.ones(1)], torch.tensor([[1, 0, 1]]))
    assert mislabelled(several, num_labels=3).labels.tolist() == [[0, 1, 0]]


def test_real_examples_are_canaries_too() -> None:
    config = _config("example", "training.batch_size=24")
    plan, model = _plan("example", "training.batch_size=24"), _model()
    before = [parameter.clone() for parameter in model.module.parameters()]
    trials, checks = sample_runs(
        config, plan, model, _private_examples(), seconds=60.0, seed=0, alpha=1e-4
    )
    assert checks == []
    assert [trial.server_round for trial in trials] == [1, 2]
    assert {(t.trial, t.canaries, t.falsified) for t in trials} == {
        ("sample canaries", 24, False)
    }
    assert math.isfinite(trials[-1].bounds[0].epsilon)
    for parameter, old in zip(model.module.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_a_release_that_notices_a_fault_is_a_failed_check(monkeypatch) -> None:
    config = _config("example", "training.batch_size=24")
    plan, model = _plan("example", "training.batch_size=24"), _model()
    train = "fedpeft.audit.trials.samples._Trainee.train"
    monkeypatch.setattr(train, lambda self, state, examples, draws: state)
    trials, (check,) = sample_runs(
        config, plan, model, _private_examples(), seconds=1.0, seed=0, alpha=1e-4
    )
    assert trials == []
    assert (check.check, check.status) == ("canaries-0: a client answers", "failed")
    assert "nothing is released" in check.detail
