"""What all see of a round: the server's step, and what it were without a client."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from fedpeft.attacks._reading import read
from fedpeft.attacks.attack import Case
from fedpeft.attacks.threats import Access
from fedpeft.attacks.update_membership import UpdateMembership
from fedpeft.config import RunConfig
from fedpeft.tensors import Tensors, add, flatten, scale, subtract, zeros_like
from simulations.aggregates import only_aggregates
from simulations.attacking import attacks_aggregates, release_form
from simulations.observing import observe
from tests.attacks.federation import cases_of, small_config, small_model
from tests.audit.test_evidence import SCENARIO


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    knowledge = replace(small_model("lora"), config=small_config("run.rounds=2"))
    return cases_of(knowledge, rounds=2, victims=4, strangers=12)


def mean(updates: list[Tensors]) -> Tensors:
    total = zeros_like(updates[0])
    for update in updates:
        total = add(total, update)
    return scale(total, 1 / len(updates))


def assert_near(left: Tensors, right: Tensors) -> None:
    assert torch.allclose(flatten(left), flatten(right), atol=1e-6)


def test_an_aggregate_is_what_the_state_moved_by(cases: list[Case]) -> None:
    for case, seen in zip(cases, only_aggregates(cases), strict=True):
        first, last = seen.observation.seen
        assert (first.server_round, last.server_round) == (1, 2)
        own = [case.observation.seen, *case.observation.others]
        assert_near(first.update, mean([rounds[0].update for rounds in own]))
        assert case.observation.final is not None
        exact = subtract(case.observation.final, last.state)
        assert torch.equal(flatten(last.update), flatten(exact))
        assert seen.observation.others == ()
        assert seen.observation.final is None


def test_the_control_is_the_same_round_without_the_client(cases: list[Case]) -> None:
    for case, seen in zip(cases, only_aggregates(cases), strict=True):
        assert seen.control is not None
        for number, part in enumerate(seen.control.seen):
            others = [rounds[number].update for rounds in case.observation.others]
            assert_near(part.update, mean(others))
            assert part.state is case.observation.seen[number].state


SMALL = (
    "run.workers=0",
    "data.max_examples=60",
    "training.learning_rate=0.5",
)


def seen_by_all(
    tmp_path: Path, *overrides: str, most_rounds: int | None = None
) -> list[tuple[Case, Case]]:
    config = RunConfig.from_toml(SCENARIO, (*SMALL, *overrides))
    cases = observe(config, tmp_path / "run", most_rounds)
    return list(zip(cases, only_aggregates(cases), strict=True))


def rounds_of(case: Case) -> list[int]:
    return [part.server_round for part in case.observation.seen]


def distances(case: Case) -> list[float]:
    assert case.control is not None
    pairs = zip(case.observation.seen, case.control.seen, strict=True)
    return [float(flatten(subtract(a.update, b.update)).norm()) for a, b in pairs]


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_under_client_level_privacy_the_noise_is_part_of_it(
    tmp_path: Path, minilm: Path, noise: str
) -> None:
    private = ("privacy.unit='client'", f"privacy.noise='{noise}'")
    pairs = seen_by_all(tmp_path, *private, "privacy.clipping_norm=0.1")
    for case, seen in pairs:
        updates = [case.observation.seen, *case.observation.others]
        moved = seen.observation.seen[0].update
        noise_of = subtract(moved, mean([rounds[0].update for rounds in updates]))
        assert flatten(noise_of).std() > 0.01
        # One client moves a sum of three by at most one norm; noise drawn anew, by far.
        within = [distance <= 1.001 * 0.1 / 3 for distance in distances(seen)]
        assert within == 2 * [noise == "seeded"]


def test_weights_and_the_server_optimiser_are_those_of_the_run(
    tmp_path: Path, minilm: Path
) -> None:
    pairs = seen_by_all(
        tmp_path,
        "privacy.unit='none'",
        "partition={name='dirichlet', num_clients=3, dirichlet_alpha=0.5}",
        "aggregation={name='mean', weighting='examples', "
        "server_optimizer={name='momentum', momentum=0.5}}",
    )
    for case, seen in pairs:
        assert seen.control is not None
        speed: Tensors | None = None
        for number, part in enumerate(seen.control.seen):
            others = [rounds[number] for rounds in case.observation.others]
            told = [other.num_examples or 0 for other in others]
            assert min(told) > 0
            weighted = [scale(o.update, n) for o, n in zip(others, told, strict=True)]
            step = scale(mean(weighted), len(told) / sum(told))
            speed = step if speed is None else add(scale(speed, 0.5), step)
            assert_near(part.update, speed)


def test_alone_in_a_cohort_an_aggregate_is_an_update(
    tmp_path: Path, minilm: Path
) -> None:
    pairs = seen_by_all(tmp_path, "privacy.unit='none'", "cohort.size=1")
    assert len(pairs) == 2  # a rotation of two rounds
    for case, seen in pairs:
        (part,) = seen.observation.seen
        assert_near(part.update, case.observation.seen[0].update)
        assert seen.control is not None
        assert not flatten(seen.control.seen[0].update).any()


def test_a_cohort_counts_as_one_client(cases: list[Case]) -> None:
    config = only_aggregates(cases)[0].observation.knowledge.config
    assert (config.nominal_units, config.training.batch_size) == (4, 4)


def test_membership_shows_in_an_aggregate_of_four_and_not_without_the_member(
    cases: list[Case],
) -> None:
    attack, rng = UpdateMembership(measure="cosine"), torch.Generator()
    for case, seen in zip(cases, only_aggregates(cases), strict=True):
        assert seen.control is not None
        candidates = case.observation.candidates
        own, control = (
            attack.run(replace(each, candidates=candidates), rng)
            for each in (seen.observation, seen.control)
        )
        assert own[0] > control[0]


def test_epsilon_of_clients_speaks_of_aggregates_alone() -> None:
    assert not attacks_aggregates(small_config())
    assert attacks_aggregates(small_config("audit.aggregate=true"))
    private = RunConfig.from_toml(SCENARIO, ("privacy.unit='client'",))
    assert attacks_aggregates(private)


DRAWN = ("cohort={sampling='poisson', size=1}", "run.rounds=6", "run.seed=1")


def test_rounds_that_nobody_was_drawn_for_are_rounds_of_noise(
    tmp_path: Path, minilm: Path
) -> None:
    private = ("privacy.unit='client'", "privacy.noise='seeded'")
    adam = "aggregation={name='mean', server_optimizer={name='momentum', momentum=0.5}}"
    pairs = seen_by_all(tmp_path, *private, "privacy.clipping_norm=0.1", *DRAWN, adam)
    answered = {number for case, _ in pairs for number in rounds_of(case)}
    assert answered < set(range(1, 7))
    for case, seen in pairs:
        assert rounds_of(seen) == rounds_of(case)
        # One norm of the first round goes on in later ones, by half each time.
        assert max(distances(seen)) <= 2 * 1.001 * 0.1


def test_a_replay_that_stops_early_shows_its_last_round_too(
    tmp_path: Path, minilm: Path
) -> None:
    pairs = seen_by_all(tmp_path, "privacy.unit='none'", most_rounds=1)
    assert [rounds_of(seen) for _, seen in pairs] == 3 * [[1]]
    for case, seen in pairs:
        updates = [case.observation.seen, *case.observation.others]
        all_of = mean([rounds[0].update for rounds in updates])
        assert_near(seen.observation.seen[0].update, all_of)


def test_a_mean_of_models_is_not_the_state_after_the_last_round(
    tmp_path: Path, minilm: Path
) -> None:
    none = ("privacy.unit='none'", "run.average_last=2")
    pairs = seen_by_all(tmp_path, *none)
    assert [rounds_of(seen) for _, seen in pairs] == 3 * [[1]]


def test_a_cohort_is_counted_in_its_own_units(cases: list[Case]) -> None:
    halves = ("cohort.size=2", "data.nominal_examples=3", "training.batch_size=3")
    part = cases[0].observation
    knowledge = replace(part.knowledge, config=small_config(*halves))
    case = replace(cases[0], observation=replace(part, knowledge=knowledge))
    seen = only_aggregates([case])[0].observation.knowledge.config
    assert (seen.data.nominal_examples, seen.training.batch_size) == (6, 6)


def test_the_servers_noise_is_in_aggregates_and_models_alone() -> None:
    private = RunConfig.from_toml(SCENARIO, ("privacy.unit='client'",))
    forms = [release_form(private, access) for access in get_args(Access)]
    assert forms == ["raw", "raw", "noised", "noised"]
    open_run = RunConfig.from_toml(SCENARIO, ("privacy.unit='none'",))
    assert {release_form(open_run, access) for access in get_args(Access)} == {"raw"}


def test_readers_are_told_of_the_servers_noise(tmp_path: Path, minilm: Path) -> None:
    pairs = seen_by_all(tmp_path, "privacy.unit='client'", "run.rounds=1")
    for case, seen in pairs:
        assert not case.observation.knowledge.is_noised
        knowledge, (part,) = seen.observation.knowledge, seen.observation.seen
        assert knowledge.is_noised
        deviations = flatten(read(part, knowledge).deviations)
        assert float(deviations.min()) > 0.5 * float(flatten(part.update).std())


def test_what_came_in_vain_is_in_no_aggregate(cases: list[Case]) -> None:
    first = cases[0].observation.seen[0]

    def changed(case: Case) -> Case:
        observation = case.observation
        marked = {id(first): replace(first, in_vain=True)}
        seen, *rest = (
            tuple(marked.get(id(part), part) for part in rounds)
            for rounds in (observation.seen, *observation.others)
        )
        new = replace(observation, seen=seen, others=tuple(rest))
        return replace(case, observation=new)

    found = only_aggregates([changed(case) for case in cases])
    assert [rounds_of(case) for case in found] == [[2], [1, 2], [1, 2], [1, 2]]
    for mine, case in enumerate(found[1:], 1):
        assert case.control is not None
        two = [
            other.observation.seen[0].update
            for place, other in enumerate(cases)
            if place not in (0, mine)
        ]
        assert_near(case.control.seen[0].update, mean(two))
