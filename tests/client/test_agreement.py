"""What a plan is called, what it may take, and how it is accepted once."""

import math
import tomllib
from pathlib import Path

import pytest

from client.agreement import AcceptedPlans, Proposal, budget_in_force, check_limits
from client.settings import LimitsSection
from client.terms import terms
from fedpeft.config import RunConfig
from fedpeft.errors import RunError
from tests.helpers import small_config

ALL_UNITS = ("example", "person", "client", "none")
NONE = "privacy.unit=none"
SECURE = "privacy.noise=secure"


def _proposal(*overrides: str, run: str = "0123456789abcdef") -> Proposal:
    config = small_config(Path("reviews.csv"), *overrides)
    return Proposal(run, config.to_toml(), "b" * 64)


def test_the_same_plan_has_the_same_hash_in_another_run() -> None:
    assert _proposal().hash == _proposal(run="f" * 16).hash
    assert len(_proposal().hash) == 64
    others = ("run.rounds=4", "privacy.target_epsilon=7", "privacy.noise=secure")
    assert len({_proposal().hash, *(_proposal(o).hash for o in others)}) == 4
    assert Proposal("0" * 16, _proposal().toml, "another backbone").hash not in {
        _proposal().hash
    }


@pytest.mark.parametrize(
    ("overrides", "limit", "budget"),
    [
        ((), None, 8.0),
        (("privacy.budget_epsilon=16",), None, 16.0),
        (("privacy.budget_epsilon=16",), 9.0, 9.0),
        ((), 20.0, 8.0),
        ((NONE,), None, math.inf),
        ((NONE,), 3.0, 3.0),
    ],
)
def test_the_tightest_budget_is_in_force(
    overrides: tuple[str, ...], limit: float | None, budget: float
) -> None:
    assert budget_in_force(_proposal(*overrides).config, limit) == budget


@pytest.mark.parametrize(
    ("overrides", "limits", "message"),
    [
        ((), {"max_epsilon": 7.9}, "max_epsilon: expected epsilon of at most 7.9 .* 8"),
        ((), {"max_delta": 1e-6}, "max_delta: expected delta .* 1e-06, got 1e-05"),
        ((), {"budget_epsilon": 4}, "budget_epsilon: expected a run within 4 "),
        ((), {"units": ("person",)}, "units: expected a plan of unit person, got 'ex"),
        (("privacy.unit=client",), {}, "units: expected a plan of unit example, pers"),
        ((NONE,), {}, "units: .* got 'none'"),
        ((NONE,), {"units": ALL_UNITS, "max_epsilon": 1e9}, "max_epsilon: .* got inf"),
        ((NONE,), {"units": ALL_UNITS, "budget_epsilon": 9}, "budget_epsilon: .* inf"),
    ],
)
def test_a_plan_beyond_a_limit_is_refused_by_its_name(
    overrides: tuple[str, ...], limits: dict, message: str
) -> None:
    with pytest.raises(RunError, match=rf"\[limits\] {message}"):
        check_limits(_proposal(SECURE, *overrides), LimitsSection(**limits))


def test_a_plan_within_the_limits_passes() -> None:
    limits = LimitsSection(max_epsilon=8, max_delta=1e-5, budget_epsilon=8)
    check_limits(_proposal(SECURE), limits)
    check_limits(_proposal(NONE), LimitsSection(units=ALL_UNITS))


@pytest.mark.parametrize("unit", ["example", "client"])
def test_noise_that_a_seed_can_remove_takes_the_clients_own_word(unit: str) -> None:
    plan, units = _proposal(f"privacy.unit={unit}"), ("example", "client")
    with pytest.raises(RunError, match=r"\[limits\] seeded_noise: .* a rehearsal"):
        check_limits(plan, LimitsSection(units=units))
    check_limits(plan, LimitsSection(units=units, seeded_noise=True))


def test_the_terms_say_what_is_promised_and_what_leaves() -> None:
    plan = _proposal(SECURE)
    rows = dict(terms(plan))
    assert rows["protects"].startswith("one example: a single row")
    assert rows["relation"].startswith("add-or-remove-one")
    assert rows["epsilon"].endswith(" planned, 8 at most")
    assert rows["delta"] == "1e-05"
    assert rows["rounds"] == (
        "3 a run, 2 of them with this client at most; further runs of the same plan "
        "until the budget is spent"
    )
    assert rows["budget over all runs"].startswith("epsilon 8,")
    assert rows["noise multiplier"] == f"{plan.plan.noise_multiplier:.4f}"
    assert rows["clipping norm"] == "1"
    assert rows["sampling rate"] == "0.5 (poisson)"
    assert rows["noise"].startswith("secure")
    assert rows["holds against"] == "everybody, the server too"
    assert rows["trained"].startswith("the adapter lora (rank = 2, first_layer = 5)")
    assert rows["scenario's data"].startswith("reviews.csv; a client that trains on a")
    assert rows["labels"] == "rotten, fresh"
    assert rows["backbone"] == f"minilm, fingerprint {'b' * 64}"
    assert "compressed by ternary" in rows["leaves this site"]
    assert "number" in rows["stays here"]
    assert rows["kept for an auditor"] == "nothing"
    assert rows["hash of all this"] == plan.hash


def test_the_terms_say_who_will_read_what_is_recorded() -> None:
    key = 64 * "a"
    rows = dict(terms(_proposal("audit.record=true", f"audit.auditor='{key}'")))
    assert rows["kept for an auditor"].startswith("every answer of this site")
    assert rows["kept for an auditor"].endswith(key)


def test_the_terms_warn_in_plain_words() -> None:
    assert dict(terms(_proposal()))["noise"].startswith("SEEDED: whoever knows")
    trusting = dict(terms(_proposal("privacy.unit=client")))
    assert trusting["holds against"].startswith("everybody but the server")
    assert (
        "cannot verify"
        in dict(terms(_proposal("privacy.unit=client", SECURE)))["noise"]
    )
    nothing = dict(terms(_proposal(NONE)))
    assert nothing["protects"].startswith("NOTHING.")
    assert nothing["epsilon"] == "infinite"
    assert "the number of examples" in nothing["leaves this site"]
    assert "number" not in nothing["stays here"]


@pytest.mark.parametrize(
    ("unit", "how"), [("example", "with the same noise"), ("client", "without noise")]
)
def test_the_terms_say_what_of_the_model_travels_and_what_stays(
    unit: str, how: str
) -> None:
    share = 'peft.share=["lora_A", "head"]'
    rows = dict(terms(_proposal(f"privacy.unit={unit}", share)))
    assert "of the tensors named lora_A or head alone" in rows["leaves this site"]
    assert f"all other tensors that are trained: {how}" in rows["stays here"]
    assert "share" not in rows["trained"]


def test_what_a_hostile_server_writes_cannot_forge_a_row() -> None:
    name = "minilm\n\x1b[2J\u202e| epsilon | 0.1 " + 1000 * "x"
    plan = Proposal(
        "0" * 16,
        small_config(Path("reviews.csv"))
        .model_copy(
            update={
                "model": _proposal().config.model.model_copy(update={"backbone": name})
            }
        )
        .to_toml(),
        "b" * 64,
    )
    rows = terms(plan)
    assert len(rows) == len(terms(_proposal()))
    assert all(value.isprintable() and len(value) < 600 for _, value in rows)


def test_an_accepted_plan_is_kept_as_it_was_shown(tmp_path: Path) -> None:
    plans, plan = AcceptedPlans(tmp_path), _proposal()
    assert not plans.holds(plan.hash)
    plans.accept(plan, terms(plan))
    assert plans.holds(plan.hash)
    assert not plans.holds(_proposal("run.rounds=4").hash)
    (path,) = (tmp_path / "accepted").iterdir()
    assert path.stem == plan.hash
    text = path.read_text()
    assert "# protects: one example: a single row of the data" in text
    assert "# To withdraw consent: stop the client, delete this file" in text
    assert tomllib.loads(text)["training"]["batch_size"] == 24
    path.write_text(f"# a note of the operator's\n{text}")
    plans.accept(plan, terms(plan))
    assert path.read_text().startswith("# a note of the operator's")


def test_a_plan_that_raises_the_budget_says_so(tmp_path: Path) -> None:
    plans = AcceptedPlans(tmp_path)
    assert plans.largest_budget() is None
    for epsilon in (8, 4):
        plan = _proposal(f"privacy.target_epsilon={epsilon}")
        plans.accept(plan, terms(plan))
    assert plans.largest_budget() == (8.0, 1e-5)

    def budget(*overrides: str) -> str:
        rows = terms(_proposal(*overrides), plans.largest_budget())
        return dict(rows)["budget over all runs"]

    assert "RAISES" not in budget()
    raised = budget("privacy.budget_epsilon=16", "privacy.target_delta=1e-4")
    assert "RAISES the budget over all runs from 8 to 16" in raised
    assert "RAISES delta from 1e-05 to 0.0001" in raised


def test_a_damaged_file_of_an_accepted_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "accepted").mkdir()
    (tmp_path / "accepted" / "x.toml").write_text("[run]\n")
    with pytest.raises(RunError, match=r"Expected an accepted plan in .*x\.toml"):
        AcceptedPlans(tmp_path).largest_budget()


def test_the_terms_say_what_is_asked_and_what_is_trained() -> None:
    rows = dict(terms(_proposal()))
    assert rows["task"].startswith("text-classification, of ")
    assert rows["trained"].endswith("and the task's head; the backbone stays as it is")
    full = dict(terms(_proposal('peft={name = "full"}')))
    assert full["trained"] == (
        "full: the backbone's own linear and normalisation layers and the task's head"
    )
    images = ("model.task=image-classification", "data.image_size=224")
    assert dict(terms(_proposal(*images)))["task"] == (
        "image-classification, of images scaled to 224 x 224 pixels"
    )


def test_the_terms_of_instructions_name_columns_and_no_labels() -> None:
    table = small_config(Path("notes.jsonl")).model_dump(exclude_none=True)
    for key in ("text", "label", "labels", "group"):
        table["data"].pop(key, None)
    table["data"] |= {"prompt": "ask", "completion": "answer"}
    table["model"]["task"] = "causal-lm"
    toml = RunConfig.model_validate(table).to_toml()
    rows = dict(terms(Proposal("0" * 16, toml, "b" * 64)))
    assert "labels" not in rows
    assert rows["prompts and completions"] == "the columns ask and answer"
    assert "head" not in rows["trained"]
