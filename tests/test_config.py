import dataclasses

import pytest

from fedpeft.config import RunConfig, build
from fedpeft.errors import ConfigError
from fedpeft.scenarios import find_scenario, shipped
from fedpeft.sections import Component

TOML = """
[run]
rounds = 3
[data]
name = "rotten-tomatoes"
nominal_examples = 512
[partition]
name = "iid"
num_clients = 4
[model]
backbone = "minilm"
[peft]
name = "lora"
rank = 2
[training]
learning_rate = 1e-3
batch_size = 32
[cohort]
size = 2
"""


@dataclasses.dataclass(frozen=True)
class Variant:
    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"Expected rank >= 1, got {self.rank}.")


def test_toml_round_trip_is_equal() -> None:
    config = RunConfig.from_toml(TOML)
    assert RunConfig.from_toml(config.to_toml()) == config
    assert config.peft.options == {"rank": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + 100_000 * "[", "tables within each other"),
        (".".join(1000 * "a") + " = 1", "tables within each other"),
        ("a = " + 5000 * "9", "Exceeds the limit"),
        ("a = 0x" + 5000 * "f", "whole numbers of 64 bits"),
        ("[run]\nrounds = 9223372036854775808", "whole numbers of 64 bits"),
    ],
)
def test_a_hostile_file_is_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_toml(text)


def test_hash_covers_results_and_not_speed() -> None:
    def hash_of(*overrides: str) -> str:
        return RunConfig.from_toml(TOML, overrides).hash

    assert hash_of() == hash_of("run.workers=1", "run.id=abc")
    assert hash_of() != hash_of("run.seed=1")
    assert hash_of() != hash_of("peft.rank=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy.epsilon=8", "[privacy] epsilon: unknown key; did you mean"),
        ("training.batchsize=8", "did you mean 'batch_size'?"),
        ("privacy.target_epsilon=0", "[privacy] target_epsilon: expected greater"),
        ("privacy.target_epsilon=-1", "got -1"),
        ("privacy.target_epsilon=nan", "expected a finite number, got nan"),
        ("privacy.clipping_norm=inf", "expected a finite number"),
        ("run.rounds=many", "got 'many'"),
        ("cohort.size=5", "num_clients = 4, got 5"),
        ("training.batch_size=600", "nominal_examples = 512, got 600"),
        ("aggregation.weighting=examples", "number of a client's examples is private"),
        ("data.path=x.csv", "either name or path"),
        ("rounds=3", "section.key=value or section={...}, got 'rounds=3'"),
        ("model.task=poetry", "[model] task"),
    ],
)
def test_a_wrong_value_is_one_clear_line(override: str, message: str) -> None:
    toml = TOML + '[aggregation]\nname = "mean"\n'
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_toml(toml, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match="expected a value, got none"):
        RunConfig.from_toml("[run]\nrounds = 1\n")


def test_broken_toml_is_one_line() -> None:
    with pytest.raises(ConfigError, match="Expected a TOML file"):
        RunConfig.from_toml("[run\n")


def test_own_file_needs_declared_labels() -> None:
    toml = TOML.replace('name = "rotten-tomatoes"', 'path = "train.csv"')
    with pytest.raises(ConfigError, match="labels are declared"):
        RunConfig.from_toml(toml)


def test_build_checks_names_keys_and_values() -> None:
    menu = {"lora": Variant}
    assert build(menu, Component(name="lora", rank=2), "peft") == Variant(2)
    with pytest.raises(ConfigError, match=r"\[peft\] name: .*did you mean 'lora'"):
        build(menu, Component(name="lra"), "peft")
    with pytest.raises(ConfigError, match=r"\[peft\] rnk: .*did you mean 'rank'"):
        build(menu, Component(name="lora", rnk=2), "peft")
    with pytest.raises(ConfigError, match=r"\[peft\]: expected rank >= 1, got 0"):
        build(menu, Component(name="lora", rank=0), "peft")
    with pytest.raises(ConfigError, match=r"\[peft\] rank: .*got 'two'"):
        build(menu, Component(name="lora", rank="two"), "peft")


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_scenario_loads(name: str) -> None:
    config = RunConfig.from_file(find_scenario(name))
    assert RunConfig.from_toml(config.to_toml()).hash == config.hash


def test_one_key_makes_a_scenario_larger() -> None:
    path = find_scenario("images")
    small = RunConfig.from_file(path)
    assert (small.data.nominal_examples, small.training.batch_size) == (400, 400)
    full = RunConfig.from_file(path, ["data.max_examples=70000"])
    assert (full.data.nominal_examples, full.training.batch_size) == (2800, 2800)
    assert RunConfig.from_toml(full.to_toml()).hash == full.hash


def test_a_nominal_number_that_is_given_stands() -> None:
    overrides = ["data.nominal_examples=300", "data.max_examples=5000"]
    config = RunConfig.from_file(find_scenario("images"), overrides)
    assert (config.data.nominal_examples, config.training.batch_size) == (300, 300)


def test_sizes_that_are_no_numbers_are_one_line() -> None:
    path = find_scenario("images")
    with pytest.raises(ConfigError, match=r"\[data\] max_examples: .*got 'all'"):
        RunConfig.from_file(path, ["data.max_examples='all'"])
    with pytest.raises(ConfigError, match=r"\[training\] batch_size: "):
        RunConfig.from_toml(TOML.replace("batch_size = 32", 'batch_size = "all"'))


def test_what_is_recorded_is_part_of_the_hash_and_what_is_attacked_is_not() -> None:
    plain = RunConfig.from_toml(TOML)
    attacked = RunConfig.from_toml(TOML, ["audit.attacks=['head_leak']"])
    assert attacked.hash == plain.hash
    key = f"audit.auditor='{64 * 'a'}'"
    recorded = RunConfig.from_toml(TOML, ["audit.record=true", key])
    assert recorded.hash != plain.hash
    other = RunConfig.from_toml(TOML, ["audit.record=true", key.replace("a'", "b'")])
    assert other.hash != recorded.hash
