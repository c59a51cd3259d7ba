"""What the transport costs: a round of clients that do nothing, bulk, memory.

Everything is real but the training: a process a client, forked from one that has
imported all it needs; mutual TLS on loopback; the grid and ``run_client`` as they are.
A round is what the round loop sees: messages made, sent, answered, read. In bulk every
client gets 100 MB and sends as many back; stock Flower does the same with a SuperLink
and three SuperNodes in the same run, see :mod:`simulations.benchmarks.stock_flower`.
Memory is what the server's process holds at most, beyond what it holds while everybody
is connected and nothing moves, with 1 MB down to each of 100 clients and up again.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flwr.app import Message

from client.agreement import Proposal
from client.connection import run_client
from client.messages import TrainReply, TrainRequest
from client.settings import ClientSection
from fedpeft.config import RunConfig
from fedpeft.keys import create_ca, create_client, create_server
from fedpeft.scenarios import find_scenario
from server.allowlist import AllowList
from server.grid import GrpcGrid
from server.settings import ServerSection
from server.slots import Slots
from simulations.benchmarks.measuring import forget_the_peak, status_bytes
from simulations.benchmarks.stock_flower import flower_seconds

NOOP_CLIENTS = (3, 10, 100)
BULK_CLIENTS = 3
MEGABYTE = 10**6
RUN = "0123456789abcdef"


def measure(megabytes: int) -> dict[str, object]:
    """Returns everything, in the shape of the result file."""
    noop, memory = {}, 0.0
    for clients in NOOP_CLIENTS:
        with federation(clients) as grid:
            milliseconds = 1000 * round_seconds(grid, b"", repeats=21)
            noop[str(clients)] = {"ms": milliseconds}
            _say(f"{clients} clients: {milliseconds:.1f} ms a round")
            if clients == max(NOOP_CLIENTS):
                memory = growth_bytes(grid, bytes(MEGABYTE)) / MEGABYTE
                _say(f"{clients} clients of 1 MB: {memory:.0f} MB over idle")
    with federation(BULK_CLIENTS) as grid:
        seconds = round_seconds(grid, bytes(megabytes * MEGABYTE), repeats=3)
    _say(f"bulk: {seconds:.2f} s a round")
    with tempfile.TemporaryDirectory() as keys:
        create_ca(Path(keys), "benchmark")
        create_server(Path(keys), ["localhost"])
        flower = flower_seconds(megabytes, BULK_CLIENTS, Path(keys))
    _say(f"stock Flower: {flower['bulk']:.2f} s, of one byte {flower['noop']:.2f} s")
    bulk = {
        "megabytes": megabytes,
        "clients": BULK_CLIENTS,
        "seconds": seconds,
        "flower_seconds": flower["bulk"],
        "flower_noop_seconds": flower["noop"],
        "speedup": flower["bulk"] / seconds,
    }
    return {"noop": noop, "bulk": bulk, "memory_mb": memory}


@contextlib.contextmanager
def federation(clients: int) -> Iterator[GrpcGrid]:
    """Starts a grid and its clients; all are ready."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["client.connection", "client.messages"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [f"client-{number:03d}" for number in range(clients)]
        grid = _grid(folder, names)
        address = f"localhost:{grid.start()}"
        processes = [
            context.Process(target=_live, args=(str(folder), one, address))
            for one in names
        ]
        for process in processes:
            process.start()
        while len(grid.connected()) < clients:
            time.sleep(0.05)
        try:
            yield grid
        finally:
            grid.close(finished=True)
            for process in processes:
                process.join()


def _grid(folder: Path, names: list[str]) -> GrpcGrid:
    create_ca(folder, "benchmark")
    create_server(folder, ["localhost"])
    lines = [create_client(folder, name).allow_line() for name in names]
    allow_file = folder / "allow.toml"
    allow_file.write_text("\n".join(["[clients]", *lines, ""]))
    scenario = find_scenario("text_reviews_nonprivate")
    overrides = (f"partition.num_clients={len(names)}", "cohort.size=1")
    config = RunConfig.from_file(scenario, overrides)
    section = ServerSection(
        scenario="none",
        output=folder,
        address="localhost:0",
        allow=allow_file,
        certificate=folder / "server.crt",
        key=folder / "server.key",
        ca=folder / "ca.crt",
    )
    allow = AllowList(allow_file)
    slots = Slots(folder / "clients.json", allow, len(names))
    proposal = Proposal(RUN, config.to_toml(), "backbone")
    return GrpcGrid(section, proposal, allow, slots, max_reply_bytes=1 << 30)


def _live(folder: str, name: str, address: str) -> None:
    """The body of a client's process: sends back as much as it gets."""
    section = ClientSection(
        server=address,
        name=name,
        state=Path(folder) / name,
        certificate=Path(folder) / f"{name}.crt",
        key=Path(folder) / f"{name}.key",
        ca=Path(folder) / "ca.crt",
    )
    run_client(section, lambda proposal, client: None, _answer)


def _answer(message: Message, client: int) -> Message:
    state = np.frombuffer(TrainRequest.from_record(message.content).state, np.uint8)
    payload = (state + np.uint8(client + 1)).tobytes()
    return Message(TrainReply("ok", payload).to_record(), reply_to=message)


def round_seconds(grid: GrpcGrid, state: bytes, repeats: int) -> float:
    """Returns the median time of a round, after one to warm up."""
    times = []
    for server_round in range(1, repeats + 2):
        started = time.perf_counter()
        _round(grid, state, server_round)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _round(grid: GrpcGrid, state: bytes, server_round: int) -> None:
    request = TrainRequest(RUN, server_round, "", "", "", state)
    nodes = grid.get_node_ids()
    messages = [
        Message(
            request.to_record(),
            dst_node_id=node,
            message_type="train",
            group_id=str(server_round),
        )
        for node in nodes
    ]
    replies = grid.send_and_receive(messages, timeout=600)
    sizes = [len(TrainReply.from_record(one.content).payload) for one in replies]
    if sizes != [len(state)] * len(nodes):
        raise RuntimeError(f"Expected {len(nodes)} whole replies, got {sizes}.")


def growth_bytes(grid: GrpcGrid, state: bytes) -> int:
    """Returns by how much this process, the server's, grows in some rounds."""
    idle = status_bytes("VmRSS")
    forget_the_peak()
    for server_round in range(1, 6):
        _round(grid, state, server_round)
    return status_bytes("VmHWM") - idle


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--megabytes", type=int, default=100, help="of bulk")
    arguments = parser.parse_args()
    result = measure(arguments.megabytes)
    print(json.dumps(result, indent=2) if arguments.json else result)


if __name__ == "__main__":
    main()
