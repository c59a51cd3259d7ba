"""Searching for a method: halving, front, a real search, and what it is charged."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from fedpeft.cli import main
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, PrivacyBudgetExceeded, RunError
from fedpeft.privacy import data_sources, epsilon, verify
from fedpeft.search import (
    Candidate,
    Trial,
    front,
    halving,
    pareto_front,
    read_candidates,
    rungs,
    shipped_candidates,
)
from fedpeft.search.halving import best_first
from fedpeft.sections import PeftSection
from fedpeft.training import shuffled_batches
from simulations.search import search
from simulations.trials import trial_config
from tests.helpers import SMALL, small_config

THREE = """
[[candidate]]
name = "head"
learning_rate = 0.5
[[candidate]]
name = "lora"
rank = 2
freeze_a = true
first_layer = 5
learning_rate = 0.5
[[candidate]]
name = "bias"
first_layer = 5
learning_rate = 0.5
"""


def _candidate(name: str, learning_rate: float = 1.0) -> Candidate:
    return Candidate(PeftSection(name=name), learning_rate)


def _trial(
    candidate: Candidate,
    value: float | None,
    *,
    rung: int = 1,
    steps: int = 4,
    bytes_up: int = 100,
    target: float | None = 8.0,
    loss: float | None = None,
) -> Trial:
    return Trial(candidate, rung, steps, target, value, bytes_up, 10, loss)


def _halved(
    values: dict[str, float | None], *, is_loss: bool = False
) -> list[list[str]]:
    """Returns who was trained in each rung, if values never change."""
    trials = halving(
        [_candidate(name) for name in values],
        4,
        lambda candidate, rung, steps: _trial(
            candidate, values[candidate.label], rung=rung, steps=steps
        ),
        is_loss=is_loss,
    )
    by_rung: dict[tuple[int, int], list[str]] = {}
    for trial in trials:
        by_rung.setdefault((trial.rung, trial.steps), []).append(trial.candidate.label)
    assert [steps for _, steps in by_rung] == [4 * 2**i for i in range(len(by_rung))]
    return list(by_rung.values())


def test_the_better_half_trains_twice_as_long() -> None:
    values = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.6, "e": 0.8}
    assert _halved(values) == [["a", "b", "c", "d", "e"], ["b", "e", "c"], ["b", "e"]]
    assert _halved(values, is_loss=True)[-1] == ["a", "d"]
    assert rungs(5, steps=4) == [(5, 4), (3, 8), (2, 16)]


def test_what_fails_does_not_survive_and_of_equal_ones_the_first_does() -> None:
    values: dict[str, float | None] = {"a": None, "b": 0.5, "c": None, "d": 0.5}
    assert _halved({**values, "e": 0.5, "f": 0.4})[-1] == ["b", "d"]
    assert _halved(values)[1:] == [["b", "d"]]
    assert _halved({"a": None, "b": None, "c": None}) == [["a", "b", "c"]]
    assert _halved({"a": 0.1}) == [["a"]]


def test_the_loss_decides_between_equal_values() -> None:
    losses = {"a": 0.9, "b": 0.6, "c": 0.7, "d": 0.1}
    values = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.4}
    trials = [_trial(_candidate(n), values[n], loss=losses[n]) for n in values]
    ordered = best_first(trials, is_loss=False)
    assert [t.candidate.label for t in ordered] == ["b", "c", "a", "d"]
    assert best_first(trials, is_loss=True)[0].candidate.label == "d"


def test_the_front_holds_what_no_other_row_dominates() -> None:
    assert pareto_front([(1, 3), (2, 2), (3, 1), (3, 3), (2, 2)]) == [0, 1, 2, 4]
    assert pareto_front([]) == []
    rows = [(a, b, (a * b) % 7) for a in range(5) for b in range(5)]
    places = pareto_front(rows)
    for place, row in enumerate(rows):
        beaten = [
            other
            for other in rows
            if other != row and all(x <= y for x, y in zip(other, row, strict=True))
        ]
        assert (place in places) == (not beaten)


def test_a_table_stands_for_its_longest_training_at_its_best_rate() -> None:
    slow, fast = _candidate("lora", 0.1), _candidate("lora", 1.0)
    head, bias = _candidate("head"), _candidate("bias")
    trials = [
        _trial(slow, 0.9, bytes_up=99),
        _trial(fast, 0.6, bytes_up=100),
        _trial(head, 0.6, bytes_up=10),
        _trial(bias, 0.5, bytes_up=50),
        _trial(fast, 0.8, steps=8, bytes_up=101),
        _trial(fast, 0.7, steps=8, target=1.0),
        _trial(_candidate("film"), None),
    ]
    found = front(trials, is_loss=False)
    # bias: less accurate than head, and larger. A byte more or less counts nothing.
    assert [(t.candidate.label, t.value, t.epsilon) for t in found] == [
        ("head", 0.6, 8.0),
        ("lora", 0.7, 1.0),
        ("lora", 0.8, 8.0),
    ]
    assert [t.candidate.label for t in front(trials, is_loss=True)] == [
        "head",
        "bias",
        "lora",
    ]


def test_the_shipped_candidates_are_about_two_dozen_different_ones() -> None:
    found = shipped_candidates(6, learning_rate=2.0)
    assert 20 <= len(found) <= 28
    assert len({(c.label, c.learning_rate) for c in found}) == len(found)
    assert {c.learning_rate for c in found} == {0.5, 2.0, 8.0}
    assert "lora rank=8 freeze_a=true first_layer=3" in {c.label for c in found}
    assert len({c.label for c in shipped_candidates(0, 1.0)}) == 8


def test_a_table_can_be_pasted(tmp_path: Path) -> None:
    path = tmp_path / "candidates.toml"
    path.write_text(THREE + '[[candidate]]\nname = "film"\n')
    found = read_candidates(path, learning_rate=2.0)
    assert [c.learning_rate for c in found] == [0.5, 0.5, 0.5, 0.5, 2.0, 8.0]
    text = re.sub(r"\[peft\][^[]*", "", SMALL).format(path="reviews.csv")
    config = RunConfig.from_toml(text + found[1].toml)
    assert config.peft == found[1].peft


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "[[candidate]] tables and nothing else, got none"),
        ("candidate = []", "[[candidate]] tables and nothing else, got none"),
        ("candidate = [1]", "candidate 1: expected a table, got 1"),
        ("[peft]\nname = 'lora'", "got peft"),
        ("[[candidate]]\nname = 'lra'", "did you mean 'lora'?"),
        ("[[candidate]]\nname = 'lora'\nrnk = 2", "did you mean 'rank'?"),
        ("[[candidate]]\nname = 'lora'\nrank = 0", "rank"),
        ("[[candidate]]\nrank = 2", "[candidate] name: expected a value"),
        ("[[candidate]]\nname = 'head'\nlearning_rate = -1", "below 1e+30, got -1"),
        ("[[candidate]]\nname = 'head'\nlearning_rate = nan", "below 1e+30, got nan"),
        ("[[candidate]]\nname = 'head'\nlearning_rate = true", "below 1e+30, got True"),
        ("[[candidate", "expected a TOML file"),
    ],
)
def test_a_file_of_other_candidates_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "candidates.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_candidates(path, learning_rate=1.0)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    path = tmp_path / "three.toml"
    path.write_text(THREE)
    return path


def _config(reviews: Path, *more: str) -> RunConfig:
    return small_config(reviews, "data.validation_fraction=0.2", *more)


def test_a_search_on_public_data_repeats_itself_and_charges_nothing(
    small_reviews: Path, three: Path
) -> None:
    config = _config(small_reviews)
    first = search(config, candidates=three, steps=1, epsilons=[1.0, 8.0])
    second = search(config, candidates=three, steps=1)
    shown = [(t.rung, t.steps, t.epsilon) for t in first.trials]
    assert shown == 3 * [(1, 1, 8.0)] + 2 * [(2, 2, 8.0)] + 2 * [(2, 2, 1.0)]
    assert all(t.value is not None and t.step_seconds for t in first.trials)
    assert [t.loss for t in first.trials[:5]] == [t.loss for t in second.trials]
    sizes = {t.candidate.label.split()[0]: t.bytes_up for t in first.trials}
    assert sizes["head"] < min(sizes["lora"], sizes["bias"])
    content = json.loads(json.dumps(first.to_json()))
    assert content["privacy"]["spent_epsilon"] is None
    assert content["trained_on"] + content["judged_on"] == len(
        first.comparison.examples
    ) + len(first.comparison.judged)
    assert len(content["front"]) == len(first.front)


def test_public_examples_look_like_a_smaller_client(
    small_reviews: Path, three: Path
) -> None:
    found = search(_config(small_reviews), candidates=three, steps=1)
    trained, config = len(found.comparison.examples), found.comparison.config
    assert trained < 48
    assert config.nominal_units == trained
    assert config.training.batch_size == round(24 * trained / 48)
    plan = found.plan
    assert plan is not None
    assert plan.local_steps == 1


def test_persons_are_charged_as_persons(small_reviews: Path, tmp_path: Path) -> None:
    path = tmp_path / "candidates.toml"
    path.write_text('[[candidate]]\nname = "head"\nlearning_rate = 1\n')
    config = _config(
        small_reviews,
        "privacy.unit=person",
        "data.person=film",
        "data.nominal_persons=6",
        "training.batch_size=3",
    )
    public = search(config, candidates=path, steps=1).comparison
    assert public.config.nominal_units == len(public.examples.units(by_person=True)) < 6
    state = tmp_path / "state"
    found = search(config, candidates=path, state=state, steps=1)
    (entry,) = verify(state, found.comparison.source).entries
    assert (entry.unit, entry.steps, entry.sampling_rate) == ("person", 1, 0.5)


def test_a_search_without_privacy_takes_as_many_steps(
    small_reviews: Path, three: Path
) -> None:
    config = _config(small_reviews, "privacy.unit=none")
    found = search(config, candidates=three, steps=1)
    candidate, records = found.trials[0].candidate, found.comparison.examples
    for steps in (1, 5):
        training = trial_config(found.comparison, candidate, steps).training
        size, epochs = training.batch_size, training.local_epochs
        batches = shuffled_batches(len(records), size, epochs, torch.Generator())
        assert len(list(batches)) == steps
    assert found.plan is None
    assert {t.epsilon for t in found.trials} == {None}
    assert found.to_json()["privacy"] is None
    with pytest.raises(ConfigError, match="--epsilons"):
        search(config, candidates=three, epsilons=[1.0])


def test_what_does_not_fit_the_backbone_is_left_out_with_its_reason(
    small_reviews: Path, tmp_path: Path
) -> None:
    path = tmp_path / "candidates.toml"
    deep = '[[candidate]]\nname = "bias"\nfirst_layer = 50\n'
    path.write_text(deep)
    with pytest.raises(ConfigError, match="none of 1; bias first_layer=50: "):
        search(_config(small_reviews), candidates=path, steps=1)
    path.write_text(deep + '[[candidate]]\nname = "head"\nlearning_rate = 1\n')
    found = search(_config(small_reviews), candidates=path, steps=1)
    assert "first_layer <= 5" in found.skipped["bias first_layer=50"]
    assert [t.candidate.label for t in found.trials] == ["head"]


def test_every_training_on_a_clients_records_is_in_its_ledger(
    small_reviews: Path, three: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    config = _config(small_reviews, "privacy.budget_epsilon=60")
    found = search(config, candidates=three, client=1, state=state, steps=2)
    assert not found.stopped
    (source,) = data_sources(state)
    assert source.startswith("client-001-")
    ledger = verify(state, source)
    assert [e.steps for e in ledger.entries] == [t.steps for t in found.trials]
    assert [e.steps for e in ledger.entries] == [2, 2, 2, 4, 4]
    assert len({e.run for e in ledger.entries}) == 5
    assert not list((state / "outbox" / source).iterdir())
    assert found.spent == ledger.spent(1e-5)
    assert 8 < ledger.spent(1e-5) <= 60
    for entry in ledger.entries:
        assert 7.9 < epsilon([entry.composition], 1e-5) <= 8
    # What private examples would show in is not said.
    assert {t.step_seconds for t in found.trials} == {None}
    assert found.to_json()["trained_on"] is None
    with pytest.raises(RunError, match="belongs to another data set or partition"):
        search(
            _config(small_reviews, "partition.num_clients=3"),
            candidates=three,
            state=state,
        )


def test_the_budget_ends_a_search_with_what_there_is(
    small_reviews: Path, three: Path, tmp_path: Path
) -> None:
    config = _config(small_reviews, "privacy.budget_epsilon=18")
    found = search(config, candidates=three, state=tmp_path, steps=2)
    done = len(found.trials)
    assert 3 <= done < 5
    assert "would exceed the budget of epsilon 18" in found.stopped
    (source,) = data_sources(tmp_path)
    assert len(verify(tmp_path, source).entries) == done
    assert found.spent is not None
    assert found.spent <= 18
    assert found.front


def test_a_first_rung_that_does_not_fit_costs_nothing(
    small_reviews: Path, three: Path, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyBudgetExceeded, match="3 trainings of the first rung"):
        search(_config(small_reviews), candidates=three, state=tmp_path, steps=2)
    assert data_sources(tmp_path) == []


def test_a_training_that_fails_is_charged_and_falls_out(
    small_reviews: Path, tmp_path: Path
) -> None:
    path = tmp_path / "candidates.toml"
    path.write_text(
        "".join(
            f'[[candidate]]\nname = "head"\nlearning_rate = {rate}\n'
            for rate in (1e29, 0.1, 0.2)
        )
    )
    # Weights decay past zero, further at each step.
    change = ("privacy.budget_epsilon=60", "training.weight_decay=1.0")
    state = tmp_path / "state"
    config = _config(small_reviews, *change)
    found = search(config, candidates=path, state=state, steps=2)
    (source,) = data_sources(state)
    assert len(verify(state, source).entries) == len(found.trials) == 5
    assert not list((state / "outbox" / source).iterdir())
    assert found.trials[0].value is None
    assert "finite" in found.trials[0].failure
    assert {t.candidate.learning_rate for t in found.trials[3:]} == {0.1, 0.2}


@pytest.fixture(scope="module")
def scenario(small_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "small.toml"
    path.write_text(SMALL.format(path=small_reviews))
    return path


WITH_VALIDATION = ("--set", "data.validation_fraction=0.2")
CHARGED = ("--data", "charged", "--state", "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "validation_fraction > 0, got 0"),
        ((*WITH_VALIDATION, "--data", "test"), "public or charged, got 'test'"),
        ((*WITH_VALIDATION, "--data", "charged"), "expected --state"),
        ((*WITH_VALIDATION, "--state", "x"), "--data charged beside it"),
        ((*WITH_VALIDATION, "--client", "4"), "--client: expected 0 to 3, got 4"),
        ((*WITH_VALIDATION, "--candidates", "no.toml"), "No such file"),
        ((*WITH_VALIDATION, "--epsilons", "1,-4"), "--epsilons: expected numbers"),
        ((*WITH_VALIDATION, "--budget", "0"), "--budget"),
        ((*WITH_VALIDATION, "--output", "no/where.json"), "a file in a folder"),
        ((*WITH_VALIDATION, "--set", "privacy.unit=client"), "got 'client'"),
        (
            (*WITH_VALIDATION, *CHARGED, "--set", "privacy.unit=none"),
            "an epsilon of infinity",
        ),
    ],
)
def test_a_wrong_request_is_one_line(
    scenario: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpeft", "search", str(scenario), *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    assert (left.value.code, shown.out) == (2, "")
    (line,) = shown.err.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_the_command_prints_rungs_front_and_tables(
    scenario: Path,
    three: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "found.json"
    arguments = ["--candidates", str(three), "--budget", "1", "--output", str(output)]
    command = ["fedpeft", "search", str(scenario), *WITH_VALIDATION, *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    assert left.value.code == 0
    assert shown.err.count("rung ") == 5
    for words in ("What nothing else beats", "[peft]", "nothing is charged", "# 1: "):
        assert words in shown.out
    assert len(json.loads(output.read_text())["trials"]) == 5
