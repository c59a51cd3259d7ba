"""Whole runs on the real MiniLM and real reviews, in this process."""

import fcntl
import json
import math
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from client.flower import set_identity
from client.site import open_site
from fedpeft.config import RunConfig
from fedpeft.data import load, partition, split
from fedpeft.errors import FedpeftError, RunError
from fedpeft.model import build_model
from fedpeft.privacy import data_sources, verify
from fedpeft.tensors import flatten
from server.app import app
from simulations.engine import simulate
from simulations.grid import InProcessGrid
from simulations.workers import WorkerPool
from tests.helpers import small_config

RESULT = {
    "schema_version": None,
    "config_hash": None,
    "versions": None,
    "task": None,
    "trainable_parameters": None,
    "backbone_parameters": None,
    "final": {"metric", "value"},
    "rounds": None,
    "threads": None,
    "privacy": {
        "unit",
        "relation",
        "target_epsilon",
        "target_delta",
        "planned_epsilon",
        "spent_epsilon",
        "accountant",
        "noise_multiplier",
        "sampling_rate",
        "local_steps",
        "max_participations",
        "clipping_norm",
        "noise",
    },
    "communication": {
        "bytes_up",
        "bytes_down",
        "bytes_up_dense_fp32",
        "ratio",
        "entropy_bound_ratio",
    },
    "seconds": None,
    "peak_memory_bytes": None,
}
ROUND = {"round", "cohort_size", "replies", "failures", "metric"}
ROUND |= {"bytes_up", "bytes_down", "seconds"}


def _model(output: Path) -> torch.Tensor:
    return flatten(load_file(output / "model" / "adapter.safetensors"))


@pytest.fixture(scope="module")
def finished(small_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; other tests compare with it."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    simulate(small_config(small_reviews), output)
    return output


def test_the_run_directory_is_complete(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    for key, inside in RESULT.items():
        assert key in result
        assert inside is None or inside <= result[key].keys()
    assert [record["round"] for record in result["rounds"]] == [1, 2, 3]
    assert all(record.keys() >= ROUND for record in result["rounds"])
    events = (finished / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in events] == result["rounds"]
    assert (finished / "config.toml").exists()
    assert len(list((finished / "ledger").glob("*.jsonl"))) == 4


def test_epsilon_is_planned_below_the_target_and_spent_below_the_plan(
    finished: Path,
) -> None:
    privacy = json.loads((finished / "result.json").read_text())["privacy"]
    assert 7.9 < privacy["planned_epsilon"] <= 8.0
    assert privacy["spent_epsilon"] <= privacy["planned_epsilon"]
    ledgers = [verify(finished, source) for source in data_sources(finished)]
    # Three rounds of two of four clients: two clients were asked twice.
    assert sorted(len(ledger.entries) for ledger in ledgers) == [1, 1, 2, 2]
    assert privacy["spent_epsilon"] == max(ledger.spent(1e-5) for ledger in ledgers)


def test_bytes_are_counted_as_they_travel(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    sent = result["communication"]
    assert sent["bytes_up_dense_fp32"] == 4 * result["trainable_parameters"] * 6
    outbox = [
        load_file(path)["payload"].numel()
        for path in (finished / "outbox").rglob("*.safetensors")
    ]
    assert sent["bytes_up"] == sum(outbox)
    assert sent["entropy_bound_ratio"] >= 1


def test_a_seed_gives_the_same_tensors_in_worker_processes(
    small_reviews: Path, finished: Path, tmp_path: Path
) -> None:
    simulate(small_config(small_reviews, "run.workers=2"), tmp_path / "run")
    assert torch.equal(_model(tmp_path / "run"), _model(finished))


def test_another_seed_gives_other_tensors(
    small_reviews: Path, finished: Path, tmp_path: Path
) -> None:
    simulate(small_config(small_reviews, "run.seed=1"), tmp_path / "run")
    assert not torch.equal(_model(tmp_path / "run"), _model(finished))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    small_reviews: Path, finished: Path, tmp_path: Path, caplog
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    newest = output / "checkpoint" / "round-000003.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    before = {p: p.read_bytes() for p in (output / "ledger").iterdir()}
    simulate(small_config(small_reviews), output, resume=True)
    assert "round-000003.safetensors damaged" in caplog.text
    assert torch.equal(_model(output), _model(finished))
    # The clients repeated their stored answers: nothing was released again.
    assert {p: p.read_bytes() for p in (output / "ledger").iterdir()} == before


def test_no_whole_checkpoint_is_one_clear_line(
    small_reviews: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for path in (output / "checkpoint").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(RunError, match="is whole: the run cannot be resumed"):
        simulate(small_config(small_reviews), output, resume=True)


def test_resume_refuses_a_changed_configuration(
    small_reviews: Path, finished: Path
) -> None:
    with pytest.raises(RunError, match="a changed one"):
        simulate(
            small_config(small_reviews, "training.learning_rate=0.2"),
            finished,
            resume=True,
        )


def test_an_output_directory_with_another_run_is_refused(
    small_reviews: Path, finished: Path
) -> None:
    before = _model(finished)
    with pytest.raises(RunError, match="holds something already"):
        simulate(small_config(small_reviews), finished)
    assert torch.equal(_model(finished), before)


def test_a_second_run_on_the_same_data_continues_the_ledgers(
    small_reviews: Path, tmp_path: Path
) -> None:
    state = f"run.state={tmp_path / 'state'}"
    simulate(small_config(small_reviews, state), tmp_path / "first")
    with pytest.raises(RunError, match=r"0 .*budget-spent"):
        simulate(small_config(small_reviews, state, "run.seed=1"), tmp_path / "second")
    spent = [verify(tmp_path / "state", s) for s in data_sources(tmp_path / "state")]
    assert all(ledger.spent(1e-5) <= 8.0 for ledger in spent)


def test_a_wider_budget_lets_a_second_run_add_to_the_first(
    small_reviews: Path, tmp_path: Path
) -> None:
    state = f"run.state={tmp_path / 'state'}"
    budget = "privacy.budget_epsilon=20"
    first = small_config(small_reviews, state, budget, "run.rounds=2")
    simulate(first, tmp_path / "first")
    second = small_config(small_reviews, state, budget, "run.rounds=2", "run.seed=1")
    privacy = simulate(second, tmp_path / "second")["privacy"]
    # Twice the same plan, composed as one: more than one run, less than the sum.
    assert 8.0 < privacy["spent_epsilon"] < 16.0


def test_a_state_directory_serves_one_partition_only(
    small_reviews: Path, finished: Path, tmp_path: Path
) -> None:
    state = f"run.state={finished}"
    with pytest.raises(RunError, match="another data set or partition"):
        simulate(
            small_config(small_reviews, state, "partition.seed=1"), tmp_path / "run"
        )


def test_a_broken_ledger_stops_the_run_with_the_reason(
    small_reviews: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    simulate(
        small_config(small_reviews, f"run.state={state}", "run.rounds=1"),
        tmp_path / "first",
    )
    for path in (state / "ledger").iterdir():
        path.write_text(path.read_text().replace('"steps": 2', '"steps": 1'))
    with pytest.raises(RunError, match="2 ledger-refused"):
        simulate(
            small_config(small_reviews, f"run.state={state}", "run.rounds=1"),
            tmp_path / "second",
        )


@pytest.mark.parametrize("method", ["head", "bias", "ssf"])
def test_every_method_trains_under_privacy(
    small_reviews: Path, tmp_path: Path, method: str
) -> None:
    # LoRA is what the other tests run.
    config = small_config(small_reviews, "run.rounds=1").model_dump(mode="json")
    config["peft"] = {"name": method}
    result = simulate(type(small_config(small_reviews))(**config), tmp_path / "run")
    assert result["rounds"][0]["replies"] == 2
    assert _model(tmp_path / "run").isfinite().all()


def test_without_privacy_one_client_is_plain_pytorch(
    small_reviews: Path, tmp_path: Path
) -> None:
    config = small_config(
        small_reviews,
        "privacy.unit=none",
        "partition.num_clients=1",
        "cohort.size=1",
        "training.batch_size=1000",
        "run.rounds=2",
    )
    dense = {"name": "dense"}
    config = config.model_copy(
        update={"compression": type(config.compression)(**dense)}
    )
    simulate(config, tmp_path / "run")

    splits = split(load(config.data), config.data)
    model = build_model(config, 2)
    (indices,) = partition(splits.train, config.partition)
    examples = model.task.encode(splits.train.subset(indices))
    batch = model.task.collate(examples, list(range(len(examples))))
    trainable = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    model.module.eval()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.module(**batch.inputs), batch.labels).backward()
        optimizer.step()
    actual = load_file(tmp_path / "run" / "model" / "adapter.safetensors")
    expected = flatten({n: p.detach() - start[n] for n, p in trainable.items()})
    moved = flatten({n: actual[n] - start[n] for n in trainable})
    assert math.isclose(moved.norm(), expected.norm(), rel_tol=1e-4)
    assert (moved - expected).norm() < 1e-5 * expected.norm()


def test_more_clients_than_groups_is_one_clear_line(
    small_reviews: Path, tmp_path: Path
) -> None:
    config = small_config(small_reviews, "partition.num_clients=30", "cohort.size=30")
    with pytest.raises(FedpeftError, match="30") as caught:
        simulate(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_changed_data_do_not_continue_a_ledger(
    small_reviews: Path, tmp_path: Path
) -> None:
    path = tmp_path / "reviews.csv"
    shutil.copy(small_reviews, path)
    state = f"run.state={tmp_path / 'state'}"
    simulate(small_config(path, state, "run.rounds=1"), tmp_path / "first")
    with path.open("a") as file:
        file.write("one more review,fresh,another film\n")
    with pytest.raises(RunError, match="counted in two ledgers"):
        simulate(small_config(path, state, "run.rounds=1"), tmp_path / "second")


def test_two_processes_cannot_share_a_run_directory(
    small_reviews: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with (output / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="Another process is running"):
            simulate(small_config(small_reviews), output)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    small_reviews: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    (output / "checkpoint").mkdir(parents=True)
    shutil.copy(finished / "config.toml", output)
    simulate(small_config(small_reviews), output, resume=True)
    assert torch.equal(_model(output), _model(finished))


def test_everybody_who_waits_for_a_dead_worker_is_told() -> None:
    set_identity()
    before = set(multiprocessing.active_children())
    pool = WorkerPool(1, {})
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    worker.join()
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    for answer in [pool.submit(message, client) for client in (0, 1)]:
        with pytest.raises(RunError, match="A client process died"):
            answer.result(timeout=60)
    pool.close()


def test_the_server_app_runs_as_flower_would_call_it_and_goes_on_when_told_to(
    small_reviews: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    config = small_config(small_reviews)
    shared = {"config": config.to_toml(), "state": str(tmp_path / "state")}
    set_identity()
    pool = WorkerPool(0, shared)
    grid = InProcessGrid(pool, config.partition.num_clients)
    send = grid.send_and_receive

    def stop_in_round_2(messages: list, *, timeout: float) -> list:
        if messages[0].metadata.group_id == "2":
            raise RunError("stopped")
        return send(messages, timeout=timeout)

    def start(flower_run: int, **changes: bool) -> None:
        settings = {"output": str(tmp_path / "run"), "deadline-seconds": 600.0}
        run_config = {**shared, **settings, "resume": False, **changes}
        app(grid, Context(flower_run, 1, {}, RecordDict(), run_config))

    monkeypatch.setattr(grid, "send_and_receive", stop_in_round_2)
    with pytest.raises(RunError, match="stopped"):
        start(255)
    monkeypatch.undo()
    start(256, resume=True)
    pool.close()
    stored = RunConfig.from_file(tmp_path / "run" / "config.toml")
    assert stored.run.id == "00000000000000ff"
    assert torch.equal(_model(tmp_path / "run"), _model(finished))
    privacy = json.loads((tmp_path / "run" / "result.json").read_text())["privacy"]
    whole = json.loads((finished / "result.json").read_text())["privacy"]
    assert (privacy.pop("spent_over"), whole.pop("spent_over")) == (
        "this run",
        "all runs in the ledgers",
    )
    assert privacy == whole  # the plan's price is what the ledgers say


@pytest.fixture(autouse=True)
def _fresh_site() -> None:
    """A site per test: the engine of one must not serve another."""
    open_site.cache_clear()
