"""The contract over the menu, then what is particular to each partitioner."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import seeds
from fedpeft.data import PARTITIONERS, Examples, Partitioner, partition
from fedpeft.data.by_group import ByGroup
from fedpeft.data.dirichlet import Dirichlet
from fedpeft.data.iid import Iid
from fedpeft.data.shards import Shards
from fedpeft.errors import ConfigError
from fedpeft.sections import PartitionSection


def make(labels: list[int], groups: list[str] | None = None) -> Examples:
    return Examples(
        contents=tuple(f"text {i}" for i in range(len(labels))),
        labels=torch.tensor(labels, dtype=torch.int64),
        groups=tuple(groups) if groups is not None else None,
        label_names=("a", "b", "c"),
    )


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Examples, int]:
    """Draws examples of any label skew and any group sizes, enough for the clients."""
    num_clients = draw(st.integers(1, 8))
    num_examples = draw(st.integers(2 * num_clients, 60))
    labels = st.lists(st.integers(0, 2), min_size=num_examples, max_size=num_examples)
    others = st.lists(
        st.integers(0, 12),
        min_size=num_examples - num_clients,
        max_size=num_examples - num_clients,
    )
    groups = [*range(num_clients), *draw(others)]  # at least one group a client
    return make(draw(labels), [f"g{group}" for group in groups]), num_clients


@pytest.mark.parametrize("name", PARTITIONERS)
@given(task=tasks(), seed=st.integers(0, 2**32))
def test_every_index_lies_with_one_client_and_no_client_is_empty(
    name: str, task: tuple[Examples, int], seed: int
) -> None:
    examples, num_clients = task
    partitioner = PARTITIONERS[name]()
    clients = partitioner.partition(examples, num_clients, seeds.generator(seed))
    assert len(clients) == num_clients
    assert all(client == sorted(client) != [] for client in clients)
    assert sorted(i for client in clients for i in client) == [*range(len(examples))]
    again = partitioner.partition(examples, num_clients, seeds.generator(seed))
    assert clients == again


@pytest.mark.parametrize("name", PARTITIONERS)
def test_another_seed_gives_another_partition(name: str) -> None:
    examples = make([0, 1, 2] * 20, [f"g{i // 3}" for i in range(60)])
    results = {
        str(PARTITIONERS[name]().partition(examples, 4, seeds.generator(seed)))
        for seed in range(5)
    }
    assert len(results) == 5


@pytest.mark.parametrize("name", PARTITIONERS)
@pytest.mark.parametrize("num_clients", [0, 4])
def test_clients_that_would_stay_empty_are_refused_with_both_numbers(
    name: str, num_clients: int, rng: torch.Generator
) -> None:
    examples = make([0, 1, 2], ["g", "h", "i"])
    with pytest.raises(ConfigError, match=rf"expected 1 to \d.*got {num_clients};"):
        PARTITIONERS[name]().partition(examples, num_clients, rng)


def test_iid_sizes_differ_by_at_most_one(rng: torch.Generator) -> None:
    clients = Iid().partition(make([0] * 11), 4, rng)
    assert sorted(map(len, clients)) == [2, 3, 3, 3]


def label_skew(partitioner: Partitioner, rng: torch.Generator) -> float:
    """Returns the mean share of a client's commonest label: 0.5 is even, 1 is one."""
    examples = make([0, 1] * 1000)
    clients = partitioner.partition(examples, 10, rng)
    shares = [
        max(Counter(examples.labels[client].tolist()).values()) / len(client)
        for client in clients
    ]
    return sum(shares) / len(shares)


def test_dirichlet_goes_from_one_label_a_client_to_even(rng: torch.Generator) -> None:
    skews = [label_skew(Dirichlet(alpha), rng) for alpha in (0.01, 0.5, 1e6)]
    assert skews[0] > 0.95
    assert skews[2] < 0.51
    assert skews == sorted(skews, reverse=True)


def test_dirichlet_alone_with_one_client_gives_it_all(rng: torch.Generator) -> None:
    assert Dirichlet().partition(make([2, 0, 1]), 1, rng) == [[0, 1, 2]]


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_dirichlet_alpha_must_be_positive_and_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match="<= dirichlet_alpha <= 1e6, got"):
        Dirichlet(alpha)


def test_by_group_keeps_groups_whole_and_sizes_even(rng: torch.Generator) -> None:
    groups = [name for name in "abcdefgh" for _ in range(5)]
    clients = ByGroup().partition(make([0] * 40, groups), 4, rng)
    assert [len(client) for client in clients] == [10, 10, 10, 10]
    owners = [{groups[i] for i in client} for client in clients]
    assert sum(map(len, owners)) == 8


def test_by_group_deals_the_largest_first(rng: torch.Generator) -> None:
    groups = [*"a" * 6, *"b" * 4, *"c" * 3]
    clients = ByGroup().partition(make([0] * 13, groups), 2, rng)
    assert sorted(map(len, clients)) == [6, 7]


def test_by_group_refuses_more_clients_than_groups(rng: torch.Generator) -> None:
    with pytest.raises(ConfigError, match=r"expected 1 to 2, .* 2 groups, got 3"):
        ByGroup().partition(make([0] * 5, [*"ababa"]), 3, rng)


def test_by_group_without_groups_names_the_key(rng: torch.Generator) -> None:
    with pytest.raises(ConfigError, match=r"\[data\] group"):
        ByGroup().partition(make([0] * 5), 3, rng)


def test_shards_limit_the_labels_of_a_client(rng: torch.Generator) -> None:
    examples = make([0, 1, 2] * 20)
    clients = Shards(shards_per_client=1).partition(examples, 3, rng)
    assert [len(client) for client in clients] == [20, 20, 20]
    assert [len(set(examples.labels[client].tolist())) for client in clients] == [1] * 3
    clients = Shards(shards_per_client=2).partition(examples, 6, rng)
    assert all(len(set(examples.labels[client].tolist())) <= 2 for client in clients)


def test_shards_need_an_example_each(rng: torch.Generator) -> None:
    assert len(Shards(3).partition(make([0] * 6), 2, rng)) == 2
    with pytest.raises(ConfigError, match=r"6 examples for 3 shards a client, got 3"):
        Shards(3).partition(make([0] * 6), 3, rng)
    with pytest.raises(ValueError, match="expected shards_per_client >= 1, got 0"):
        Shards(0)


def section(**keys: object) -> PartitionSection:
    return PartitionSection.model_validate({"num_clients": 2, **keys})


def test_section_chooses_partitioner_options_and_seed() -> None:
    examples = make([0, 1, 2] * 10)
    first = partition(examples, section(name="dirichlet", dirichlet_alpha=0.1))
    assert first == partition(examples, section(name="dirichlet", dirichlet_alpha=0.1))
    assert first != partition(examples, section(name="dirichlet", dirichlet_alpha=9.0))
    assert partition(examples, section(name="iid", seed=1)) != partition(
        examples, section(name="iid", seed=2)
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "dirichle"}, "did you mean 'dirichlet'"),
        ({"name": "shards", "shard_per_client": 2}, "did you mean 'shards_per_client'"),
        ({"name": "dirichlet", "dirichlet_alpha": 0.0}, "0.001 <= dirichlet_alpha"),
    ],
)
def test_section_errors_are_one_line(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        partition(make([0] * 4), section(**keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dirichlet", "shards"])
def test_several_labels_an_example_cannot_be_dealt_by_label(name: str) -> None:
    labels = torch.tensor([[0, 1], [1, 1]])
    examples = Examples(("a", "b"), labels, None, ("x", "y"))
    section = PartitionSection(
        name=name,
        num_clients=1,
        **({"shards_per_client": 1} if name == "shards" else {}),
    )
    with pytest.raises(ConfigError, match=f"{name} deals by label"):
        partition(examples, section)
