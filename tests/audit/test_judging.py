"""An attack's outcome is judged beside its baseline and its prior-only control."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from fedpeft.attacks.attack import (
    Attack,
    Case,
    Knowledge,
    Observation,
    Scores,
    Secret,
    Seen,
    View,
)
from fedpeft.attacks.threats import ThreatModel
from fedpeft.audit.judging import judge
from fedpeft.data import Encoded

GRANTED = ThreatModel("D", "updates", "reconstruct")
KNOWLEDGE = Knowledge(model=None, config=None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReadTheUpdate(Attack[float]):
    """The update of these clients is their secret label, or says nothing."""

    needs: ClassVar[ThreatModel] = ThreatModel("A", "update", "reconstruct")
    metrics: ClassVar[dict[str, str]] = {"hit": "share", "closeness": "dB"}

    def run(self, observation: Observation, rng: torch.Generator) -> float:
        return float(observation.seen[0].update["w"])

    def score(self, guess: float, secret: Secret) -> Scores:
        error = abs(guess - float(secret.examples.labels[0]))
        return {
            "hit": torch.tensor([float(error < 0.5)]),
            "closeness": torch.tensor([-error]),
        }

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        return self.score(0.0, secret)

    def shown(self, guess: float, case: Case) -> tuple[View, View]:
        return f"is {float(case.secret.examples.labels[0]):.0f}", f"says {guess:.0f}"


@dataclass(frozen=True)
class GuessEach(Attack[torch.Tensor]):
    """A client's update is a guess at each of its records' labels; nothing to see."""

    needs: ClassVar[ThreatModel] = ThreatModel("A", "update", "reconstruct")
    metrics: ClassVar[dict[str, str]] = {"never": "share", "hit": "share"}

    def run(self, observation: Observation, rng: torch.Generator) -> torch.Tensor:
        return observation.seen[0].update["w"]

    def score(self, guess: torch.Tensor, secret: Secret) -> Scores:
        return {"hit": (guess == secret.examples.labels).double() / 3}

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        return self.score(torch.tensor(0), secret)


def a_case(label: int, says: float) -> Case:
    seen = Seen(1, {}, {"w": torch.tensor(says)})
    secret = Secret(Encoded([torch.zeros(1)], torch.tensor([label])))
    return Case(Observation(KNOWLEDGE, (seen,)), secret)


def test_what_the_update_tells_is_what_exceeds_the_control() -> None:
    cases = [a_case(label, says=label) for label in range(20)]
    result = judge("read", ReadTheUpdate(), cases, GRANTED, seed=0)
    assert (result.victims, result.records) == (20, 20)
    assert result.metrics["hit"].value == 1
    assert result.metrics["hit"].method == "Clopper-Pearson"
    assert result.metrics["hit"].low == pytest.approx(0.025 ** (1 / 20))
    assert result.prior_only["hit"].value == 0  # another one's label
    assert result.baseline["hit"].value == 0.05  # the one whose label is 0
    assert result.difference["hit"].value == 1
    assert result.difference["closeness"].low > 0


def test_an_update_that_tells_nothing_is_no_better_than_its_control() -> None:
    cases = [a_case(label % 2, says=0) for label in range(20)]
    result = judge("read", ReadTheUpdate(), cases, GRANTED, seed=0)
    assert result.metrics["hit"].value == result.prior_only["hit"].value == 0.5
    assert result.difference["hit"].low <= 0 <= result.difference["hit"].high


def test_what_needs_more_than_is_granted_is_not_run() -> None:
    final_only = ThreatModel("D", "final-model", "reconstruct")
    cases = [a_case(0, says=0), a_case(1, says=1)]
    result = judge("read", ReadTheUpdate(), cases, final_only, seed=0)
    assert result.misfit == "it needs access update"
    assert result.metrics == {}
    assert result.victims == 0


@pytest.mark.parametrize(("count", "words"), [(0, "none was"), (1, "1 was")])
def test_fewer_than_two_victims_have_no_control(count: int, words: str) -> None:
    cases = [a_case(0, says=0)] * count
    result = judge("read", ReadTheUpdate(), cases, GRANTED, seed=0)
    assert result.misfit == (
        f"at least two clients must be seen for a prior-only control, and {words}"
    )
    assert (result.metrics, result.victims) == ({}, 0)


def test_an_estimate_names_its_method() -> None:
    cases = [a_case(label, says=label) for label in range(2)]
    difference = judge("read", ReadTheUpdate(), cases, GRANTED, seed=0).difference
    method = "BCa bootstrap and Student t over victims"
    assert difference["closeness"].method == method
    assert difference["hit"].method == f"{method}, and a share of unseen others"


def test_equal_seeds_give_equal_results() -> None:
    cases = [a_case(label, says=label % 3) for label in range(9)]
    first, second = (
        judge("read", ReadTheUpdate(), cases, GRANTED, seed=3) for _ in range(2)
    )
    assert first.metrics == second.metrics
    assert first.difference == second.difference


def test_every_record_s_value_is_kept_beside_its_control_s() -> None:
    cases = [a_case(label, says=label) for label in (0, 1, 2)]
    result = judge("read", ReadTheUpdate(), cases, GRANTED, seed=0)
    assert result.values == {"hit": (1, 1, 1), "closeness": (0, 0, 0)}
    assert result.control_values == {"hit": (0, 0, 0), "closeness": (-1, -1, -2)}


def test_values_are_one_a_record_with_four_decimals() -> None:
    two = Secret(Encoded(2 * [torch.zeros(1)], torch.tensor([0, 1])))
    cases = [
        Case(Observation(KNOWLEDGE, (Seen(1, {}, {"w": torch.tensor(says)}),)), two)
        for says in (0, 5)
    ]
    result = judge("each", GuessEach(), cases, GRANTED, seed=0)
    assert result.values == {"hit": (0.3333, 0, 0, 0)}
    assert result.control_values == {"hit": (0, 0, 0.3333, 0)}
    assert result.exhibits == ()


def test_the_best_the_middle_and_the_worst_read_are_shown() -> None:
    cases = [a_case(label, says) for label, says in ((1, 9), (2, 2), (3, 3), (4, 9))]
    result = judge("read", ReadTheUpdate(), cases, GRANTED, seed=0)
    shown = [(each.truth, each.guess, each.control) for each in result.exhibits]
    assert shown == [
        ("is 2", "says 2", "says 3"),
        ("is 1", "says 9", "says 2"),
        ("is 4", "says 9", "says 9"),
    ]
    assert [each.score for each in result.exhibits] == [1, 0, 0]
    pair = judge("read", ReadTheUpdate(), cases[:2], GRANTED, seed=0)
    assert [each.truth for each in pair.exhibits] == ["is 2", "is 1"]


def test_nothing_of_the_run_s_own_records_is_shown() -> None:
    cases = [a_case(label, says=label) for label in range(3)]
    replay, own = (
        judge("read", ReadTheUpdate(), cases, GRANTED, seed=0, column=column)
        for column in ("replay", "this-run")
    )
    assert own.exhibits == ()
    assert own.values == replay.values
    with pytest.raises(ValueError, match="exhibits of a replay alone"):
        replace(own, exhibits=replay.exhibits)


def test_victims_of_one_class_each_are_judged_by_class() -> None:
    cases = [a_case(label % 2, says=1) for label in range(20)]
    names = ("no", "yes", "never seen")
    result = judge("read", ReadTheUpdate(), cases, GRANTED, seed=0, classes=names)
    found = {name: (e.victims, e.found.value) for name, e in result.by_class.items()}
    assert found == {"no": (10, 0), "yes": (10, 1)}
    assert result.by_class["yes"].found.low == pytest.approx(0.025 ** (1 / 10))
    assert result.by_class["no"].control.value == 0


@pytest.mark.parametrize("names", [(), ("",), ("no", "yes")])
def test_without_classes_or_with_mixed_victims_there_are_none(names) -> None:
    mixed = Secret(Encoded(2 * [torch.zeros(1)], torch.tensor([0, 1])))
    cases = [a_case(0, says=0), replace(a_case(1, says=1), secret=mixed)]
    result = judge("read", ReadTheUpdate(), cases, GRANTED, seed=0, classes=names)
    assert result.by_class == {}


def test_a_misfit_has_nothing_of_any_record() -> None:
    final_only = ThreatModel("D", "final-model", "reconstruct")
    cases = [a_case(0, says=0), a_case(1, says=1)]
    result = judge(
        "read", ReadTheUpdate(), cases, final_only, seed=0, classes=("a", "b")
    )
    assert result == result.in_short()
