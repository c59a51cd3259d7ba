"""Server and clients as processes, with certificates, on loopback."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.data import load, partition, split
from fedpeft.privacy import data_sources, read_memory, verify
from fedpeft.tensors import flatten
from simulations.engine import simulate
from tests.deploy.federation import NAMES, Federation

pytestmark = pytest.mark.slow


def _model(run: Path) -> torch.Tensor:
    return flatten(load_file(run / "model" / "adapter.safetensors"))


def _run(one: Federation) -> dict:
    server = one.server()
    clients = [one.client(name) for name in one.names]
    server.ends()
    for client in clients:
        client.ends()
    return json.loads((one.run / "result.json").read_text())


def test_a_deployed_run_equals_the_simulation_bit_for_bit(
    federation, tmp_path: Path
) -> None:
    one = federation()
    deployed = _run(one)
    simulated = simulate(one.config, tmp_path / "simulated")
    assert torch.equal(_model(one.run), _model(tmp_path / "simulated"))
    assert deployed["final"] == simulated["final"]
    assert deployed["config_hash"] == simulated["config_hash"]
    for key in ("planned_epsilon", "spent_epsilon", "unit", "noise_multiplier"):
        assert deployed["privacy"][key] == simulated["privacy"][key]
    for ours, theirs in zip(deployed["rounds"], simulated["rounds"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    # The same ledgers, each at its client, and none at the server.
    for index, name in enumerate(NAMES):
        (source,) = data_sources(one.state(name))
        mine = verify(one.state(name), source).entries
        theirs = verify(tmp_path / "simulated", source).entries
        assert source.startswith(f"client-{index:03d}-")
        assert [e.payload_hash for e in mine] == [e.payload_hash for e in theirs]
    assert not (one.run / "ledger").exists()


def test_clients_with_files_of_their_own_come_to_the_same_model(
    federation, tmp_path: Path
) -> None:
    one = federation()
    _write_shares(one)
    _run(one)
    simulate(one.config, tmp_path / "simulated")
    assert torch.equal(_model(one.run), _model(tmp_path / "simulated"))
    assert data_sources(one.state("north")) == ["north-records"]


def test_what_stays_is_in_each_clients_state_directory_alone(
    federation, tmp_path: Path
) -> None:
    one = federation('peft.share=["lora_A", "head"]')
    deployed = _run(one)
    simulated = simulate(one.config, tmp_path / "simulated")
    assert torch.equal(_model(one.run), _model(tmp_path / "simulated"))
    assert {record["metric"] for record in deployed["rounds"]} == {None}
    assert simulated["final"]["value"] is not None
    for name in NAMES:
        (source,) = data_sources(one.state(name))
        mine = read_memory(one.state(name), source, deployed["run"]).local
        run = simulated["run"]
        theirs = read_memory(tmp_path / "simulated", source, run).local
        assert mine
        assert torch.equal(flatten(mine), flatten(theirs))
    assert not (one.run / "outbox").exists()


def _write_shares(one: Federation) -> None:
    """Gives each client its part as a file: one csv, one jsonl, one parquet."""
    import csv

    import pyarrow
    import pyarrow.parquet

    config: RunConfig = one.config
    train = split(load(config.data), config.data).train
    parts = partition(train, config.partition)
    for name, indices in zip(NAMES, parts, strict=True):
        rows = [
            {"note": train.contents[i], "mark": train.label_names[int(train.labels[i])]}
            for i in indices
        ]
        path = one.folder / f"{name}-records"
        if name == "north":
            path = path.with_suffix(".csv")
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["note", "mark"])
                writer.writeheader()
                writer.writerows(rows)
        elif name == "east":
            path = path.with_suffix(".jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path = path.with_suffix(".parquet")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        one.write_client(name, f'path = "{path.name}"\ntext = "note"\nlabel = "mark"')
