"""Client processes: each of one thread, each with the backbone once.

Any worker can serve any client, since a client between rounds is only files: its ledger
and its outbox. Messages travel as Flower's own bytes; none is pickled.
"""

import json
import logging
import multiprocessing
import queue
import re
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from flwr.app import Message

from client.flower import from_bytes, set_identity, to_bytes
from fedpeft.errors import RunError

_PATIENCE_SECONDS = 5
"""For a worker to end by itself; a client in the middle of training loses nothing."""


def handle(message: Message, run_config: dict[str, str], client: int) -> Message:
    """Gives a message to the ClientApp as `client`; an exception becomes an error."""
    from client.app import deliver  # here, so that each process imports it once, itself

    return deliver(message, run_config, {"partition-id": client})


class WorkerPool:
    """A fixed number of client processes; 0 runs everything in this one.

    Args:
        workers: processes.
        run_config: what every client's Flower context holds.
    """

    def __init__(self, workers: int, run_config: dict[str, str]) -> None:
        self._run_config = run_config
        self._idle: queue.Queue[Connection] = queue.Queue()
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._threads = ThreadPoolExecutor(max(1, workers))
        spawn = multiprocessing.get_context("spawn")
        for _ in range(workers):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, json.dumps(run_config))
            process = spawn.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._idle.put(ours)

    def submit(self, message: Message, client: int) -> "Future[Message]":
        """Hands a message to the next idle worker."""
        run = self._in_worker if self._processes else self._here
        return self._threads.submit(run, message, client)

    def peak_memory_bytes(self) -> int:
        """Returns the sum of the workers' largest resident sets so far."""
        return sum(_peak_memory_bytes(process.pid) for process in self._processes)

    def close(self) -> None:
        """Ends the workers."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for connection in self._connections:
            connection.close()  # to a worker that waits, this is the end
        for process in self._processes:
            process.join(_PATIENCE_SECONDS)
            process.terminate()
            process.join()

    def _here(self, message: Message, client: int) -> Message:
        torch.set_num_threads(1)
        return handle(from_bytes(to_bytes(message)), self._run_config, client)

    def _in_worker(self, message: Message, client: int) -> Message:
        connection = self._idle.get()
        try:
            connection.send_bytes(json.dumps({"client": client}).encode())
            connection.send_bytes(to_bytes(message))
            reply = from_bytes(connection.recv_bytes())
        except (EOFError, OSError):
            raise RunError(
                "A client process died, perhaps for lack of memory. Nothing was lost: "
                "go on with --resume, with fewer [run] workers."
            ) from None
        finally:  # also of a dead worker: who waits for one is told at once
            self._idle.put(connection)
        return reply


def _peak_memory_bytes(pid: int | None) -> int:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():  # another system, or a worker that has ended
        return 0
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    return 1024 * int(found[1]) if found else 0


def _work(connection: Connection, run_config: str) -> None:
    """Answers messages until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    torch.set_num_threads(1)
    set_identity()
    config = json.loads(run_config)
    logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
    try:
        while True:
            client = json.loads(connection.recv_bytes())["client"]
            message = from_bytes(connection.recv_bytes())
            reply = handle(message, config, client)
            connection.send_bytes(to_bytes(reply))
    except (EOFError, OSError):
        return
