"""The same apps under Flower's own engines, in real processes on loopback."""

import io
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from flwr.cli.build import build_fab_from_disk
from safetensors.torch import load_file

from fedpeft.privacy import data_sources, verify
from fedpeft.tensors import flatten
from simulations.engine import simulate
from tests.deploy.federation import wait_until
from tests.helpers import SMALL, small_config

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 180
CHANGES = ("partition.num_clients=2", "cohort.size=2", 'peft={name="head"}')


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_holds_code_and_scenarios_and_nothing_else() -> None:
    bundle = build_fab_from_disk(ROOT)
    assert len(bundle) < 2**21
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = {name for name in archive.namelist() if not name.endswith(".py")}
        code = {name.split("/")[0] for name in set(archive.namelist()) - names}
    assert code == {"client", "fedpeft", "server", "simulations"}
    scenarios = {name for name in names if name.startswith("simulations/")}
    assert "simulations/text_reviews.toml" in scenarios
    others = {
        ".info/CONTENT",
        "LICENSE",
        "fedpeft/assets/catalogue.toml",
        "pyproject.toml",
    }
    assert names - scenarios == others


@pytest.mark.slow
def test_flowers_simulation_on_ray_gives_the_same_model(engine: "Engine") -> None:
    # `flwr run` starts a SuperLink by itself, and leaves it running.
    run = engine.run(2, "--federation-config", "num-supernodes=2")
    assert engine.replies(run) == [2, 2]
    assert torch.equal(_model(run), _model(engine.reference(2)))
    assert _entries(run) == [2, 2]


@pytest.mark.slow
def test_supernodes_over_tls_give_the_same_model(
    engine: "Engine", key_folder: Path
) -> None:
    port = _free_port()
    engine.settings.write_text(
        f'[superlink.tls]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{key_folder / "ca.crt"}"\n'
    )
    engine.start_superlink(port, key_folder)
    states = [engine.start_supernode(port, key_folder, client) for client in (0, 1)]
    run = engine.run(1, "tls")
    assert engine.replies(run) == [2]
    assert torch.equal(_model(run), _model(engine.reference(1)))
    assert [_entries(state) for state in states] == [[1], [1]]
    assert not (run / "ledger").exists()


class Engine:
    """Flower's commands, with a home of their own; `close` ends what they started."""

    def __init__(self, folder: Path, reviews: Path) -> None:
        self._folder = folder
        self._reviews = reviews
        self._scenario = folder / "small.toml"
        self._scenario.write_text(SMALL.format(path=reviews))
        self._home = folder / "flwr"
        self._home.mkdir()
        self.settings = self._home / "config.toml"
        self._started: list[subprocess.Popen[bytes]] = []

    def run(self, rounds: int, *options: str) -> Path:
        """Runs the scenario to its end, under `flwr run`; returns the run directory."""
        changes = " ".join([f"run.rounds={rounds}", *CHANGES])
        given = f"scenario='{self._scenario}' set='{changes}' deadline-seconds=120.0"
        command = ["run", str(ROOT), *options, "--stream", "--run-config", given]
        process = self._start("flwr", *command)
        process.wait(PATIENCE_SECONDS)
        found = list((self._folder / "runs").glob("flwr-*/result.json"))
        assert len(found) == 1, (self._folder / "flwr.log").read_text()
        return found[0].parent

    def reference(self, rounds: int) -> Path:
        """Runs it in this process, without Flower's engines."""
        config = small_config(self._reviews, f"run.rounds={rounds}", *CHANGES)
        simulate(config, self._folder / "whole")
        return self._folder / "whole"

    def replies(self, run: Path) -> list[int]:
        """How many answers counted, in each round."""
        result = json.loads((run / "result.json").read_text())
        return [record["replies"] for record in result["rounds"]]

    def start_superlink(self, port: int, keys: Path) -> None:
        """Starts a SuperLink and waits until it listens."""
        self._start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--ssl-certfile", str(keys / "server.crt")),
            *("--ssl-keyfile", str(keys / "server.key")),
            *("--ssl-ca-certfile", str(keys / "ca.crt")),
            *("--database", str(self._folder / "state.db")),
        )
        wait_until(lambda: _listens(port), "the SuperLink", 60)

    def start_supernode(self, port: int, keys: Path, client: int) -> Path:
        """Starts a client's SuperNode, with its own records; returns its state."""
        state = self._folder / f"state-{client}"
        node = f"partition-id={client} state='{state}'"
        own = json.dumps({"share": client})
        self._start(
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{port}", "--port", str(_free_port())),
            *("--root-certificates", str(keys / "ca.crt")),
            *("--node-config", f"{node} data='{own}'"),
        )
        return state

    def close(self) -> None:
        """Kills every process that has this home, whoever started it."""
        deadline = time.monotonic() + 30
        while mine := [p for p in psutil.process_iter() if self._is_mine(p)]:
            assert time.monotonic() < deadline, mine
            for process in mine:
                process.kill()
            time.sleep(0.1)
        for started in self._started:
            started.wait(10)

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("FLWR_HOME") == str(self._home)
        except psutil.Error:  # it has ended, or is somebody else's
            return False

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {
            **os.environ,
            "PATH": path,  # Flower's daemons look for more of its commands there
            "FLWR_HOME": str(self._home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        with (self._folder / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(
                [Path(sys.executable).parent / name, *arguments],
                env=environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        self._started.append(started)
        return started


@pytest.fixture
def engine(tmp_path: Path, small_reviews: Path) -> Iterator[Engine]:
    one = Engine(tmp_path, small_reviews)
    yield one
    one.close()


def _model(run: Path) -> torch.Tensor:
    return flatten(load_file(run / "model" / "adapter.safetensors"))


def _entries(state: Path) -> list[int]:
    """The number of releases in every ledger of a state directory."""
    return [len(verify(state, name).entries) for name in data_sources(state)]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
