"""The same exchange by stock Flower: a SuperLink, SuperNodes, TLS, no accounts.

Its engine starts a process for every message, so a round that moves next to nothing is
measured too: what bulk takes beyond that is the transport alone. The SuperLink keeps
its objects in memory, which is the faster of its two ways. Content is new in every
round and differs among the replies, since Flower moves equal content once.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

_START_SECONDS = 120
_RUN_SECONDS = 1200

_PROJECT = """
[project]
name = "bulk"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "bulk.server_app:app"
clientapp = "bulk.client_app:app"

[tool.flwr.app.config]
clients = 1
megabytes = 1
repeats = 1
output = ""
"""

_CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    data = message.content["data"]["bytes"].data
    shifted = np.frombuffer(data, np.uint8) + np.uint8(context.node_id % 255 + 1)
    array = Array("uint8", (len(data),), "bytes", shifted.tobytes())
    content = RecordDict({"data": ArrayRecord({"bytes": array})})
    return Message(content, reply_to=message)
"""

_SERVER = """
import json
import os
import statistics
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


def round_seconds(grid, nodes, size):
    data = os.urandom(size)
    started = time.perf_counter()
    array = Array("uint8", (size,), "bytes", data)
    messages = [
        Message(
            RecordDict({"data": ArrayRecord({"bytes": array})}),
            dst_node_id=node,
            message_type="train",
            group_id="1",
        )
        for node in nodes
    ]
    replies = list(grid.send_and_receive(messages))
    sizes = [len(reply.content["data"]["bytes"].data) for reply in replies]
    assert sizes == [size] * len(nodes), sizes
    return time.perf_counter() - started


@app.main()
def main(grid, context):
    given = context.run_config
    while len(nodes := list(grid.get_node_ids())) < given["clients"]:
        time.sleep(0.1)
    seconds = {}
    for name, size in (("noop", 1), ("bulk", given["megabytes"] * 10**6)):
        times = [round_seconds(grid, nodes, size) for _ in range(given["repeats"])]
        seconds[name] = statistics.median(times)
    Path(given["output"]).write_text(json.dumps(seconds))
"""


def flower_seconds(
    megabytes: int, clients: int, keys: Path, repeats: int = 2
) -> dict[str, float]:
    """Returns the median seconds of a round of bulk, and of one of a single byte.

    Args:
        megabytes: down to every client, and up again.
        clients: SuperNodes.
        keys: folder of ``ca.crt`` and ``server.*`` for localhost.
        repeats: rounds of each kind.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as processes:
        folder, ports = Path(name), _free_ports(clients + 1)
        result = folder / "seconds.json"
        link = f"localhost:{ports[0]}"
        environment = _prepare(folder, link, keys)
        commands = [_super_link(ports[0], keys)]
        commands += [_super_node(link, port, keys) for port in ports[1:]]
        for number, command in enumerate(commands):
            log = folder / f"{number}.log"
            processes.enter_context(_running(command, environment, log))
            if number == 0:
                _wait_for(ports[0])
        facts = {"clients": clients, "megabytes": megabytes, "repeats": repeats}
        settings = [f"{key}={value}" for key, value in facts.items()]
        settings.append(f"output='{result}'")
        command = [_tool("flwr"), "run", str(folder / "app"), "stock", "--stream"]
        options = ["--run-config", " ".join(settings)]
        done = subprocess.run(
            [*command, *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_RUN_SECONDS,
        )
        if not result.exists():
            raise RuntimeError(f"Flower's run failed: {done.stdout}{done.stderr}")
        seconds: dict[str, float] = json.loads(result.read_text())
        return seconds


def _prepare(folder: Path, link: str, keys: Path) -> dict[str, str]:
    """Writes the app and Flower's settings; returns the environment to run them in."""
    package = folder / "app" / "bulk"
    package.mkdir(parents=True)
    (folder / "app" / "pyproject.toml").write_text(_PROJECT)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(_CLIENT)
    (package / "server_app.py").write_text(_SERVER)
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "stock"\n\n[superlink.stock]\n'
        f'address = "{link}"\nroot-certificates = "{keys / "ca.crt"}"\n'
    )
    programs = str(Path(sys.executable).parent)  # Flower looks for its own on the path
    return {
        **os.environ,
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _super_link(port: int, keys: Path) -> list[str]:
    command = [_tool("flower-superlink"), "--host", "localhost", "--port", str(port)]
    files = {"certfile": "server.crt", "keyfile": "server.key", "ca-certfile": "ca.crt"}
    options = [part for k, v in files.items() for part in (f"--ssl-{k}", str(keys / v))]
    return [*command, *options]


def _super_node(link: str, port: int, keys: Path) -> list[str]:
    command = [_tool("flower-supernode"), "--superlink", link, "--port", str(port)]
    return [*command, "--root-certificates", str(keys / "ca.crt")]


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


@contextmanager
def _running(
    command: Sequence[str], environment: dict[str, str], log: Path
) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [
            held.enter_context(socket.create_server(("", 0))) for _ in range(count)
        ]
        return [one.getsockname()[1] for one in sockets]


def _wait_for(port: int) -> None:
    """Waits until somebody listens.

    Raises:
        RuntimeError: if nobody does.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if not probe.connect_ex(("localhost", port)):
                return
        time.sleep(0.2)
    raise RuntimeError(f"Expected Flower's SuperLink at port {port}, found nobody.")
