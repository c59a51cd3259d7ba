"""The plan: a pure function of public constants, just under its target."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.privacy.accountant import Composition, epsilon
from fedpeft.privacy.calibration import calibrate
from fedpeft.privacy.plan import Plan, make_plan, nominal_steps, rotation_cap
from fedpeft.scenarios import find_scenario
from fedpeft.sections import TrainingSection

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


def config(*overrides):
    return RunConfig.from_toml(SCENARIO, overrides)


@pytest.fixture(scope="module")
def plan():
    return make_plan(config("privacy.clipping_norm=0.5"))


def test_without_privacy_there_is_no_plan():
    assert make_plan(config("privacy.unit=none")) is None


def test_a_plan_follows_from_the_public_constants(plan):
    # 20 rounds of 6 clients are 120 seats for 20 clients; 512 / 32 is 16.
    noise = calibrate(0.0625, 96, target_epsilon=8.0, target_delta=1e-5)
    assert plan == Plan(
        unit="example",
        relation="add-or-remove-one",
        target_epsilon=8.0,
        target_delta=1e-5,
        planned_epsilon=epsilon([Composition(noise, 0.0625, 96)], 1e-5),
        noise_multiplier=noise,
        clipping_norm=0.5,
        sampling="poisson",
        sampling_rate=0.0625,
        nominal_batch=32,
        local_steps=16,
        max_participations=6,
    )


def test_the_planned_epsilon_lies_just_under_the_target(plan):
    assert 7.9 < plan.planned_epsilon <= 8.0


def test_a_client_spends_what_was_planned_and_no_more(plan):
    rounds = [plan.composition() for _ in range(plan.max_participations)]
    spent = [epsilon(rounds[:done], 1e-5) for done in range(len(rounds) + 1)]
    assert spent == sorted(spent)
    assert spent[0] == 0.0
    assert spent[-1] == plan.planned_epsilon
    assert plan.composition(plan.max_participations) == Composition(
        plan.noise_multiplier, 0.0625, 96
    )


def test_what_is_not_public_or_does_not_matter_changes_nothing(plan):
    same = make_plan(
        config(
            "privacy.clipping_norm=0.5",
            "run.seed=7",
            "run.workers=1",
            "training.learning_rate=0.1",
            "partition.seed=3",
        )
    )
    assert same == plan
    assert same.hash == plan.hash


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unit", "client"),
        ("relation", "replace-one"),
        ("target_epsilon", 7.0),
        ("target_delta", 1e-6),
        ("noise_multiplier", 0.5),
        ("clipping_norm", 1.0),
        ("sampling_rate", 0.1),
        ("nominal_batch", 33),
        ("local_steps", 17),
        ("max_participations", 7),
    ],
)
def test_the_hash_covers_every_parameter(plan, field, value):
    assert dataclasses.replace(plan, **{field: value}).hash != plan.hash


def test_the_hash_does_not_cover_what_a_machine_may_round_differently(plan):
    last_bit = dataclasses.replace(plan, planned_epsilon=plan.planned_epsilon - 1e-12)
    assert last_bit.hash == plan.hash


def test_a_target_out_of_reach_says_how_many_rounds_fit():
    overrides = ("privacy.target_epsilon=0.003", "run.rounds={}", "cohort.size=7")

    def attempt(rounds):
        return make_plan(config(*(line.format(rounds) for line in overrides)))

    with pytest.raises(
        ConfigError, match=r"in 1000 rounds, got 0.003 .* (\d+) rounds"
    ) as caught:
        attempt(1000)
    fit = int(str(caught.value).split(" rounds fit")[0].split()[-1])
    assert fit > 0
    assert attempt(fit).planned_epsilon <= 0.003
    with pytest.raises(ConfigError, match=f"{fit} rounds fit"):
        attempt(fit + 1)


def test_a_target_that_not_even_one_round_meets_says_so():
    with pytest.raises(ConfigError, match=r": 0 rounds fit; raise the target"):
        make_plan(config("privacy.target_epsilon=1e-6", "privacy.target_delta=1e-9"))


def test_a_rate_above_one_is_refused():
    checked = config()
    data = checked.data.model_copy(update={"nominal_examples": 16})
    with pytest.raises(ConfigError, match=r"expected 1 to 16, .* got 32"):
        make_plan(checked.model_copy(update={"data": data}))


def test_a_delta_below_double_precision_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"\[privacy\]: Expected delta >= "):
        make_plan(config("privacy.target_delta=1e-15"))


@pytest.mark.parametrize(
    ("local_epochs", "batch_size", "expected"),
    [(1.0, 32, 16), (2.0, 32, 32), (0.25, 128, 1), (0.01, 512, 1), (1.0, 100, 5)],
)
def test_nominal_steps(local_epochs, batch_size, expected):
    training = TrainingSection(
        learning_rate=0.1, local_epochs=local_epochs, batch_size=batch_size
    )
    assert nominal_steps(training, 512) == expected


@given(rounds=st.integers(1, 40), num_clients=st.integers(1, 15), share=st.floats(0, 1))
def test_no_client_exceeds_the_cap_and_one_reaches_it(rounds, num_clients, share):
    cohort_size = max(1, round(share * num_clients))
    times = [0] * num_clients
    for server_round in range(1, rounds + 1):
        for seat in range(cohort_size):
            times[((server_round - 1) * cohort_size + seat) % num_clients] += 1
    assert max(times) == rotation_cap(rounds, cohort_size, num_clients)


def test_the_shipped_epsilon_equals_the_closed_form_from_above() -> None:
    # Full batches: the composition is one Gaussian mechanism (Balle & Wang 2018, (6)).
    plan = make_plan(RunConfig.from_file(find_scenario("text_reviews")))
    assert plan.sampling_rate == 1
    steps = plan.max_participations * plan.local_steps
    shift = math.sqrt(steps) / plan.noise_multiplier

    def delta(epsilon: float) -> float:
        upper = stats.norm.cdf(shift / 2 - epsilon / shift)
        return upper - math.exp(epsilon) * stats.norm.cdf(-shift / 2 - epsilon / shift)

    exact = optimize.brentq(lambda e: delta(e) - plan.target_delta, 0.1, 50)
    assert exact <= plan.planned_epsilon <= exact * 1.001
    assert 7.9 < plan.planned_epsilon <= 8.0


PERSONS = (
    "privacy.unit=person",
    "data.person=patient",
    "data.nominal_persons=64",
    "training.batch_size=16",
    "training.local_epochs=2",
)
CLIENTS = ("privacy.unit=client", "privacy.target_epsilon=20")


def test_persons_take_the_place_of_examples():
    plan = make_plan(config(*PERSONS))
    assert (plan.unit, plan.relation) == ("person", "add-or-remove-one")
    # 2 epochs over 64 nominal persons in batches of 16.
    assert (plan.sampling_rate, plan.local_steps, plan.nominal_batch) == (0.25, 8, 16)
    assert plan.max_examples == 8
    assert plan.planned_epsilon <= 8.0


def test_clients_in_a_rotation_are_not_amplified():
    plan = make_plan(config(*CLIENTS))
    assert (plan.sampling_rate, plan.local_steps, plan.nominal_batch) == (1.0, 1, 6)
    assert plan.composition(6) == Composition(plan.noise_multiplier, 1.0, 6)
    assert plan.max_participations == 6
    assert not plan.is_secret


def test_secret_cohorts_amplify_and_charge_every_round():
    plan = make_plan(config(*CLIENTS, "cohort.sampling=poisson"))
    assert plan.composition(20) == Composition(plan.noise_multiplier, 0.3, 20)
    assert plan.max_participations == 20
    assert plan.is_secret


def test_fixed_cohorts_are_accounted_with_their_own_relation():
    poisson = make_plan(config(*CLIENTS, "cohort.sampling=poisson"))
    fixed = make_plan(config(*CLIENTS, "cohort.sampling=fixed"))
    assert fixed.relation == "replace-one"
    assert fixed.composition().sampling == "fixed"
    # A replaced update moves the sum by two norms: more than twice the noise.
    assert fixed.noise_multiplier > 2 * poisson.noise_multiplier


def test_banded_noise_costs_what_independent_noise_does():
    banded = make_plan(config(*CLIENTS, "privacy.mechanism=banded"))
    plain = make_plan(config(*CLIENTS))
    assert banded.noise_multiplier == plain.noise_multiplier
    assert banded.planned_epsilon == plain.planned_epsilon
    # A client of 20 comes again after 3 rounds of 6 at the earliest.
    assert banded.bands == 3
    assert banded.hash != plain.hash


def test_an_adaptive_norm_says_what_its_count_costs():
    adaptive = config(*CLIENTS, "privacy.adaptive_clipping={}")
    plan = make_plan(adaptive)
    assert plan.count_noise == plan.noise_multiplier  # a cohort of 6 is a small one
    large = config(
        *CLIENTS,
        "privacy.adaptive_clipping={}",
        "partition.num_clients=900",
        "cohort.size=200",
    )
    assert make_plan(large).count_noise == 10.0


@pytest.mark.parametrize(("records", "stated"), [(2, 19), (4, 50)])
def test_a_person_with_more_records_costs_what_the_readme_says(records, stated):
    plan = make_plan(RunConfig.from_file(find_scenario("text_reviews")))
    done = plan.composition(plan.max_participations)
    # k records together move a sum by k norms; at rate 1 that is all there is to it.
    together = dataclasses.replace(
        done, noise_multiplier=done.noise_multiplier / records
    )
    assert done.sampling_rate == 1
    assert round(epsilon([together], 1e-5)) == stated
