"""The three units of privacy, each in whole runs on real weights and real reviews."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, RunError
from fedpeft.menus import check_variants
from fedpeft.privacy import data_sources, make_plan, verify
from fedpeft.tensors import flatten
from simulations.engine import simulate
from tests.helpers import small_config

PERSON = (
    "privacy.unit=person",
    "data.person=film",
    "data.nominal_persons=6",
    "privacy.max_examples_per_person=4",
    "training.batch_size=3",
)
CLIENT = ("privacy.unit=client", "privacy.target_epsilon=50")
POISSON = (*CLIENT, "cohort.sampling=poisson")
CASES = {
    "person": PERSON,
    "client in a rotation": CLIENT,
    "client in Poisson cohorts": POISSON,
    "client in fixed cohorts": (*CLIENT, "cohort.sampling=fixed"),
    "client with banded noise": (*CLIENT, "privacy.mechanism=banded"),
    "client with a norm that adapts": (
        *POISSON,
        "privacy.adaptive_clipping={count_noise = 20.0}",
    ),
    "example by Opacus": ("privacy.engine=opacus",),
}


def _config(path: Path, overrides: tuple[str, ...]) -> RunConfig:
    return small_config(path, *overrides)


def _model(output: Path) -> torch.Tensor:
    return flatten(load_file(output / "model" / "adapter.safetensors"))


def _forget_the_last_round(output: Path) -> None:
    """Leaves what a crash just before the last checkpoint would."""
    max((output / "checkpoint").iterdir()).unlink()
    events = output / "events.jsonl"
    events.write_text("".join(events.read_text().splitlines(keepends=True)[:-1]))
    shutil.rmtree(output / "model")
    (output / "result.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_a_run_spends_what_it_planned_and_resumes_to_the_same_bits(
    small_reviews: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = _config(small_reviews, overrides)
    result = simulate(config, tmp_path / "whole")
    privacy = result["privacy"]
    plan = make_plan(config)
    assert privacy["unit"] == plan.unit
    assert 0 < privacy["spent_epsilon"] <= privacy["planned_epsilon"] * (1 + 1e-9)
    assert privacy["planned_epsilon"] <= plan.target_epsilon
    for source in data_sources(tmp_path / "whole"):
        for entry in verify(tmp_path / "whole", source).entries:
            assert (entry.unit, entry.relation) == (plan.unit, plan.relation)
    before = _model(tmp_path / "whole")
    _forget_the_last_round(tmp_path / "whole")
    again = simulate(config, tmp_path / "whole", resume=True)
    assert torch.equal(_model(tmp_path / "whole"), before)
    assert again["privacy"] == privacy


def test_a_result_at_client_level_does_not_count_the_clients(
    small_reviews: Path, tmp_path: Path
) -> None:
    simulate(_config(small_reviews, POISSON), tmp_path)
    text = (tmp_path / "result.json").read_text()
    result = json.loads(text)
    assert result["communication"]["bytes_up"] is None
    assert all(record["replies"] is None for record in result["rounds"])


def test_the_ledger_of_a_person_level_run_says_so(
    small_reviews: Path, tmp_path: Path
) -> None:
    config = _config(small_reviews, PERSON)
    simulate(config, tmp_path)
    entry = verify(tmp_path, data_sources(tmp_path)[0]).entries[0]
    assert (entry.unit, entry.sampling_rate, entry.steps) == ("person", 0.5, 2)


def _checked(overrides: tuple[str, ...]) -> None:
    config = _config(Path("reviews.csv"), overrides)
    check_variants(config)
    make_plan(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("privacy.unit=person",), "data.*person and nominal_persons"),
        ((*PERSON, "training.batch_size=7"), "nominal_persons = 6"),
        ((*PERSON, "privacy.max_examples_per_person=33"), "max_physical_batch = 32"),
        (("cohort.sampling=poisson",), "gains nothing from a secret cohort"),
        (
            ("privacy.budget_epsilon=1",),
            "the plan's 8.0000 .*got 1: every client",
        ),
        ((*CLIENT, "privacy.engine=opacus"), "beside engine = 'opacus'"),
        (("privacy.adaptive_clipping={quantil=0.5}",), "unknown key.*quantile"),
        (('peft={name="lora", lora_alpha=-1.0}',), "lora_alpha > 0, got -1.0"),
        (("privacy.mechanism=banded",), "unit = 'client' beside mechanism"),
        ((*POISSON, "privacy.mechanism=banded"), "sampling = 'rotation'"),
        (
            (*POISSON, "privacy.adaptive_clipping={count_noise = 0.01}"),
            "count_noise: expected count_noise >",
        ),
    ],
)
def test_what_does_not_go_together_is_one_clear_line(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _checked(overrides)
    assert "\n" not in str(caught.value)


def test_clients_that_are_never_drawn_pay_for_a_run_too(
    small_reviews: Path, tmp_path: Path
) -> None:
    state = f"run.state={tmp_path / 'state'}"
    config = _config(small_reviews, (*POISSON, "run.rounds=1", "cohort.size=1", state))
    simulate(config, tmp_path / "first")
    ledgers = [verify(tmp_path / "state", s) for s in data_sources(tmp_path / "state")]
    assert len(ledgers) == 4
    assert len({ledger.spent(1e-5) for ledger in ledgers}) == 1
    with pytest.raises(RunError, match="4 budget-spent"):
        simulate(config, tmp_path / "second")


@pytest.mark.parametrize("lost", ["checkpoint", "newest"])
def test_a_released_round_is_not_released_again(
    small_reviews: Path, tmp_path: Path, lost: str
) -> None:
    config = _config(small_reviews, CLIENT)
    simulate(config, tmp_path)
    if lost == "newest":
        max((tmp_path / "checkpoint").iterdir()).unlink()
    else:
        shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(RunError, match="a second time"):
        simulate(config, tmp_path, resume=True)
