"""Personal runs on the real MiniLM: what travels, what stays, and what it costs."""

import dataclasses
import io
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from client.site import open_site
from fedpeft.compression import COMPRESSORS
from fedpeft.config import RunConfig, build
from fedpeft.errors import ConfigError
from fedpeft.evaluation import evaluate
from fedpeft.interfaces import Payload
from fedpeft.model import build_model, load_trainable_state, shared_state
from fedpeft.privacy import Memory, data_sources, epsilon, make_plan, read_memory
from fedpeft.privacy.outbox import Outbox
from fedpeft.report import result_table
from fedpeft.sharing import split_state
from fedpeft.tensors import flatten
from server.setup import open_server
from simulations.engine import simulate
from tests.helpers import small_config

SHARES = {
    "own head": ('peft.share=["backbone"]', "head"),
    "FedSA-LoRA": ('peft.share=["lora_A", "head"]', "lora_B"),
}
CLIENT = ("privacy.unit=client", "privacy.clipping_norm=0.5")


class Run(NamedTuple):
    config: RunConfig
    output: Path
    result: dict
    stays: str

    def outbox(self) -> list[Outbox]:
        return [Outbox(self.output, source) for source in data_sources(self.output)]

    def memories(self) -> list[Memory]:
        run = self.result["run"]
        sources = data_sources(self.output)
        return [read_memory(self.output, source, run) for source in sources]


def _simulate(config: RunConfig, output: Path, stays: str = "") -> Run:
    open_site.cache_clear()
    return Run(config, output, simulate(config, output), stays)


@pytest.fixture(scope="module", params=SHARES)
def personal(request, small_reviews: Path, tmp_path_factory) -> Run:
    share, stays = SHARES[request.param]
    config = small_config(small_reviews, share)
    return _simulate(config, tmp_path_factory.mktemp("personal") / "run", stays)


def test_a_run_that_shares_everything_is_the_run_without_the_key(
    small_reviews: Path, tmp_path: Path
) -> None:
    # Seeded noise is drawn by the configuration's hash, in which the key is.
    plain = small_config(small_reviews, "privacy.unit=none", "run.rounds=2")
    every = 'peft.share=["backbone", "head"]'
    shared = small_config(small_reviews, "privacy.unit=none", "run.rounds=2", every)
    runs = [_simulate(plain, tmp_path / "a"), _simulate(shared, tmp_path / "b")]
    a, b = (run.output / "model" / "adapter.safetensors" for run in runs)
    assert torch.equal(flatten(load_file(a)), flatten(load_file(b)))
    assert runs[0].result["final"] == runs[1].result["final"]
    assert not (tmp_path / "b" / "model" / "local.safetensors").exists()


def test_only_what_is_shared_travels_and_is_published(personal: Run) -> None:
    model = build_model(personal.config, 2)
    shared, local = shared_state(model), model.local_start
    assert local
    assert all(f".{personal.stays}." in f".{name}." for name in local)
    published = load_file(personal.output / "model" / "adapter.safetensors")
    assert published.keys() == shared.keys()
    beside = load_file(personal.output / "model" / "local.safetensors")
    assert all(torch.equal(beside[name], local[name]) for name in local)
    codec = build(COMPRESSORS, personal.config.compression, "compression")
    answers = [record for box in personal.outbox() for record in box.records()]
    for record in answers:
        payload = Payload.from_bytes(record.payload)
        assert codec.decompress(payload, shared).keys() == shared.keys()
        with pytest.raises(ValueError, match="Expected"):
            codec.decompress(payload, {**shared, **local})
        assert record.memory.residual.keys() == shared.keys()
        assert record.memory.local.keys() == local.keys()
    result = personal.result
    size, kept = flatten(shared).numel(), flatten(local).numel()
    assert result["shared_parameters"] == size
    assert result["trainable_parameters"] == size + kept
    assert result["communication"]["bytes_up_dense_fp32"] == 4 * size * 6


def test_every_client_has_a_local_part_of_its_own(personal: Run) -> None:
    parts = [flatten(memory.local) for memory in personal.memories()]
    parts.append(flatten(build_model(personal.config, 2).local_start))
    assert len(parts) == 5
    for index, part in enumerate(parts):
        assert all(not torch.equal(part, other) for other in parts[:index])


def test_epsilon_is_that_of_the_run_that_shares_everything(personal: Run) -> None:
    plan = make_plan(small_config(Path("reviews.csv")))
    privacy = personal.result["privacy"]
    assert dataclasses.asdict(plan).items() <= privacy.items()
    # Three rounds of two of four clients: the worst was asked twice.
    assert privacy["spent_epsilon"] == epsilon([plan.composition(2)], 1e-5)


def test_the_metric_is_the_mean_over_the_clients_own_models(personal: Run) -> None:
    config = RunConfig.from_file(personal.output / "config.toml")
    server = open_server(config, personal.output)
    shared = load_file(personal.output / "model" / "adapter.safetensors")
    found = []
    for memory in personal.memories():
        load_trainable_state(server.model, {**shared, **memory.local})
        found.append(evaluate(server.model, server.held_out, "fp32")["accuracy"])
    final = personal.result["final"]
    assert final["value"] == pytest.approx(fmean(found))
    assert final["others"]["accuracy_worst"] == min(found)


@pytest.mark.slow
def test_worker_processes_keep_the_same_local_parts(
    personal: Run, tmp_path: Path
) -> None:
    run = personal.config.run.model_copy(update={"workers": 2})
    config = personal.config.model_copy(update={"run": run})
    again = _simulate(config, tmp_path / "run")
    for mine, theirs in zip(again.memories(), personal.memories(), strict=True):
        assert torch.equal(flatten(mine.local), flatten(theirs.local))
    assert again.result["final"] == personal.result["final"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        (),
        ("cohort.sampling=poisson",),
        ("privacy.mechanism=banded",),
        ("privacy.adaptive_clipping={quantile = 0.5}", "cohort.sampling=poisson"),
    ],
)
def test_at_client_level_nothing_is_said_of_local_parts(
    how: tuple[str, ...], small_reviews: Path, tmp_path: Path
) -> None:
    share = SHARES["FedSA-LoRA"][0]
    config = small_config(small_reviews, *CLIENT, *how, share)
    result = _simulate(config, tmp_path / "run").result
    rounds = [(r["metric"], r["others"]) for r in result["rounds"]]
    assert rounds == [(None, {})] * 3
    assert result["final"]["value"] is None
    shown = io.StringIO()
    Console(file=shown, width=80).print(result_table(result))
    assert shown.getvalue().splitlines()[1].split() == ["│", "accuracy", "│", "-", "│"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("peft.share=[]",), r"\[peft\]: expected share = \[one or more parts"),
        (('peft.share=[""]',), "without anything shared there is no federation"),
        (("peft.share=head",), r"\[peft\] share: .*got 'head'"),
        (
            (*CLIENT, 'peft.share=["head"]', "cohort.sampling=fixed"),
            "amplifies for clients without memory",
        ),
        (
            ('peft.share=["head"]', "model.task=causal-lm", 'model.samples=["a"]'),
            "the server's own model lacks what stays",
        ),
        (('peft.shar=["head"]',), "did you mean 'share'"),
    ],
)
def test_what_cannot_be_shared_is_one_clear_line(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(small_config(Path("reviews.csv"), *overrides), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fragment", ["lora_C", "lora", "layer.1", "head."])
def test_a_fragment_is_whole_parts_of_a_name(fragment: str) -> None:
    state = {"layer.10.lora_A": torch.zeros(1), "head.bias": torch.zeros(1)}
    with pytest.raises(ConfigError, match="there are: layer, lora_A, head, bias"):
        split_state(state, ["head", fragment])
