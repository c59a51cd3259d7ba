"""The planner: what stands around a plan, for all three units."""

import dataclasses
import math

import pytest

from fedpeft.config import RunConfig
from fedpeft.planner import allowances, curves, forecast, noises
from fedpeft.privacy.accountant import Composition, epsilon
from fedpeft.privacy.plan import make_plan, rotation_cap

SCENARIO = """
[run]
rounds = 20
[data]
name = "rotten-tomatoes"
nominal_examples = 512
[partition]
name = "by-group"
num_clients = 20
[model]
backbone = "minilm"
[peft]
name = "lora"
[training]
learning_rate = 1e-3
batch_size = 32
[cohort]
size = 6
"""
CLIENT = ["privacy.unit=client"]
UNITS = {
    "example": [],
    "person": ["privacy.unit=person", "data.person=author", "data.nominal_persons=128"],
    "client, rotation": CLIENT,
    "client, banded": [*CLIENT, "privacy.mechanism=banded"],
    "client, poisson": [*CLIENT, "cohort.sampling=poisson"],
    "client, fixed": [*CLIENT, "cohort.sampling=fixed"],
}


def outlook(name, *overrides, **options):
    config = RunConfig.from_toml(SCENARIO, [*UNITS[name], *overrides])
    plan = make_plan(config)
    return config, plan, forecast(config, plan, **options)


def values(rows, field="value"):
    return [getattr(row, field) for row in rows]


@pytest.mark.parametrize("name", UNITS)
def test_each_curve_passes_through_the_plan(name):
    _, plan, expected = outlook(name)
    quantities = [curve.quantity for curve in expected.curves]
    batch = ["batch size"] if plan.is_dp_sgd else []
    assert quantities == ["rounds", "noise multiplier", *batch, "cohort size"]
    for curve in expected.curves:
        (planned,) = [row for row in curve.rows if row.is_plan]
        assert planned.epsilon == plan.planned_epsilon
        assert planned.steps == plan.max_participations * plan.local_steps
        assert values(curve.rows) == sorted(set(values(curve.rows)))
        assert 5 <= len(curve.rows) <= 10


@pytest.mark.parametrize("name", UNITS)
def test_more_rounds_and_larger_cohorts_cost_more_and_more_noise_costs_less(name):
    _, _, expected = outlook(name)
    costs = {curve.quantity: values(curve.rows, "epsilon") for curve in expected.curves}
    assert costs["rounds"] == sorted(costs["rounds"])
    assert costs["cohort size"] == sorted(costs["cohort size"])
    assert costs["noise multiplier"] == sorted(costs["noise multiplier"], reverse=True)
    assert costs["rounds"][-1] > costs["rounds"][-2] > costs["rounds"][0]


def test_rounds_go_to_those_of_the_run_and_beyond():
    _, _, expected = outlook("example")
    # An eighth of 20 rounds is 2.5, rounded up to 3; 3 rounds of 6 are one walk of 18.
    assert values(expected.curves[0].rows) == [3, 5, 8, 10, 13, 15, 18, 20, 40, 80]
    caps = [rotation_cap(rounds, 6, 20) for rounds in (3, 5, 8, 10)]
    assert values(expected.curves[0].rows[:4], "steps") == [16 * cap for cap in caps]


def test_a_larger_batch_is_drawn_at_a_higher_rate_in_fewer_steps():
    _, plan, expected = outlook("example")
    (row,) = [row for row in expected.curves[2].rows if row.value == 64]
    done = Composition(plan.noise_multiplier, 64 / 512, 6 * 8)
    assert (row.steps, row.epsilon) == (48, epsilon([done], 1e-5))
    assert max(values(expected.curves[2].rows)) <= 512


def test_a_person_is_counted_among_persons():
    _, plan, expected = outlook("person")
    (row,) = [row for row in expected.curves[2].rows if row.value == 64]
    done = Composition(plan.noise_multiplier, 64 / 128, 6 * 2)
    assert (row.steps, row.epsilon) == (12, epsilon([done], 1e-5))


@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_a_secret_cohort_charges_every_round_at_the_rate_of_its_size(sampling):
    _, plan, expected = outlook(f"client, {sampling}")
    (row,) = [row for row in expected.curves[-1].rows if row.value == 12]
    done = Composition(plan.noise_multiplier, 12 / 20, 20, sampling)
    assert (row.steps, row.epsilon) == (20, epsilon([done], 1e-5))
    assert max(values(expected.curves[-1].rows)) <= 20


def test_a_public_rotation_charges_a_client_for_its_own_rounds_without_sampling():
    _, plan, expected = outlook("client, rotation")
    (row,) = [row for row in expected.curves[-1].rows if row.value == 12]
    done = Composition(plan.noise_multiplier, 1.0, 12)  # 20 rounds of 12 among 20
    assert (row.steps, row.epsilon) == (12, epsilon([done], 1e-5))


@pytest.mark.parametrize("name", UNITS)
def test_the_target_allows_these_rounds_and_not_one_participation_more(name):
    config, plan, expected = outlook(name, inverse=True)
    assert values(expected.allowances, "is_plan").count(True) == 1
    for allowed in expected.allowances:
        changed = dataclasses.replace(plan, noise_multiplier=allowed.noise_multiplier)
        more = changed.composition(allowed.participations + 1)
        assert allowed.epsilon <= plan.target_epsilon < epsilon([more], 1e-5)
        if not plan.is_secret:
            clients, size = config.partition.num_clients, config.cohort.size
            assert rotation_cap(allowed.rounds, size, clients) == allowed.participations
            further = rotation_cap(allowed.rounds + 1, size, clients)
            assert further == allowed.participations + 1
        if allowed.is_plan:
            assert allowed.rounds >= config.run.rounds
    rounds = values(expected.allowances, "rounds")
    assert rounds == sorted(rounds)


def test_a_noise_that_allows_nothing_says_zero():
    config, plan, _ = outlook("client, rotation")
    (allowed,) = allowances(config, plan, [0.3])
    assert (allowed.rounds, allowed.participations, allowed.epsilon) == (0, 0, 0.0)


def test_noises_have_three_digits_but_for_the_plan():
    _, plan, _ = outlook("example")
    around = list(noises(plan))
    assert plan.noise_multiplier in around
    assert around[0] == pytest.approx(plan.noise_multiplier / 2, rel=1e-2)
    assert all(float(f"{noise:.3g}") == noise for noise in around[:3])


def test_what_cannot_be_accounted_is_left_out():
    # Double precision resolves a delta of 2e-12 for 1,125 steps, 70 participations.
    config, plan, _ = outlook("example", "privacy.target_delta=2e-12", "run.rounds=200")
    rounds, *_ = curves(config, plan)
    assert values(rounds.rows)[-1] == 200


def test_a_run_of_one_round_and_one_client_has_its_curves():
    _, plan, expected = outlook(
        "example", "run.rounds=1", "cohort.size=1", "partition.num_clients=1"
    )
    assert values(expected.curves[0].rows) == [1, 2, 4]
    assert values(expected.curves[-1].rows) == [1]
    assert expected.epsilon_by_participations == {1: plan.planned_epsilon}


def test_epsilons_by_participations_are_forty_at_most_and_end_at_the_plan():
    _, plan, expected = outlook("client, poisson", "run.rounds=1000")
    taken = expected.epsilon_by_participations
    assert len(taken) == 40
    assert list(taken)[-1] == 1000
    assert taken[1000] == plan.planned_epsilon


def test_json_has_the_fields_of_the_plan_and_the_forecast_beside_them():
    _, plan, expected = outlook("person", inverse=True)
    content = expected.to_json()
    assert dataclasses.asdict(plan).items() <= content.items()
    assert set(content["curves"]) == {
        "rounds",
        "noise_multiplier",
        "batch_size",
        "cohort_size",
    }
    assert content["rounds"] == 20
    assert len(content["allowances"]) == 7
    for rows in content["curves"].values():
        assert all(math.isfinite(row["epsilon"]) for row in rows)
