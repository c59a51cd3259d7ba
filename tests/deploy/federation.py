"""A federation of real processes on loopback, and what must hold whatever befell it.

The processes are forked from one that has imported everything already, which saves each
of them the seconds of its imports; they run the command line itself.
"""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from client.agreement import Proposal
from fedpeft.backbone import load_backbone
from fedpeft.config import RunConfig
from fedpeft.privacy import data_sources, verify
from fedpeft.tensors import flatten
from tests.helpers import SMALL

NAMES = ("north", "east", "west")
PATIENCE_SECONDS = 180

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["client.daemon", "fedpeft.cli.client", "fedpeft.cli.server", "server.deploy"]
)


def wait_until(
    ready: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS
) -> None:
    """Waits until `ready` holds; fails after a while, saying for what it waited."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def at(place: str, action: Callable[[], None]) -> None:
    """Has this process do something when it comes to a call.

    Args:
        place: ``module:name`` or ``module:Class.name``, then ``@n`` for the n-th call
            and ``+`` for the moment after it: ``server.rounds:_cohort@2+``. After ``>``
            comes a place that is counted only from there on.
        action: what it does.
    """
    here, _, then = place.partition(">")
    where, _, count = here.partition("@")
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), [0]

    def reached() -> None:
        if then:
            at(then, action)
        else:
            action()

    @functools.wraps(original)
    def watched(*args: object, **options: object) -> object:
        calls[0] += 1
        at_this_call = calls[0] == int(count.rstrip("+"))
        if at_this_call and not count.endswith("+"):
            reached()
        result = original(*args, **options)
        if at_this_call and count.endswith("+"):
            reached()
        return result

    setattr(owner, name, watched)


def die() -> None:
    """Ends this process with -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def _command(
    arguments: list[str], log: str, place: str | None, action: Callable[[], None]
) -> None:
    """The body of a process: ``fedpeft ARGUMENTS``, its output into a file."""
    with Path(log).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if place:
        at(place, action)
    sys.argv = ["fedpeft", *arguments]
    from fedpeft.cli import main

    main()


# libfaketime breaks clock_nanosleep, with which Python sleeps.
_SLEEP = "import time, select; time.sleep = lambda s: select.select([], [], [], s)"
_MAIN = "from fedpeft.cli import main; main()"


class Interpreter:
    """``fedpeft ARGUMENTS`` started from nothing, so that its environment counts.

    It has what :class:`Command` needs of a forked process.
    """

    def __init__(
        self, arguments: list[str], log: Path, environment: dict[str, str]
    ) -> None:
        command = [sys.executable, "-c", f"{_SLEEP}; {_MAIN}"]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
            )
        self.pid = self._process.pid
        self.kill = self._process.kill

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, seconds: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


@dataclass
class Command:
    """A running ``fedpeft`` command.

    Args:
        arguments: of the command line.
        log: the file for all output; an earlier process's stays in it.
        place: where it does something to itself; see :func:`at`.
        action: what.
        environment: of an :class:`Interpreter`; None forks.
    """

    arguments: list[str]
    log: Path
    place: str | None = None
    action: Callable[[], None] = die
    environment: dict[str, str] | None = None
    process: multiprocessing.process.BaseProcess | Interpreter = field(init=False)

    def __post_init__(self) -> None:
        self._skip = self.log.stat().st_size if self.log.exists() else 0
        if self.environment is not None:
            self.process = Interpreter(self.arguments, self.log, self.environment)
            return
        arguments = (self.arguments, str(self.log), self.place, self.action)
        self.process = _CONTEXT.Process(target=_command, args=arguments)
        self.process.start()

    def output(self) -> str:
        """What this process has printed so far."""
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[self._skip :].decode()

    def says(self, text: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Waits until the process has printed a text."""
        wait_until(
            lambda: text in self.output() or not self.process.is_alive(),
            f"{text!r} from {self.arguments}",
            seconds,
        )
        assert text in self.output(), self.output()

    def ends(self, code: int = 0, seconds: float = PATIENCE_SECONDS) -> str:
        """Waits for the end, checks the exit code, returns the output."""
        self.process.join(seconds)
        assert not self.process.is_alive(), f"still running: {self.output()}"
        assert self.process.exitcode == code, self.output()
        return self.output()

    def send_signal(self, number: signal.Signals) -> None:
        """Sends the process a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Ends the process with -9."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Federation:
    """Settings, keys and processes of one server and its clients, in a folder.

    Args:
        folder: for everything.
        reviews: the scenario's data; each client takes its share.
        keys: a folder with ``ca.crt``, ``server.*`` and one pair a name; None goes
            without encryption.
        overrides: of the scenario.
        server: further keys of ``[server]``.
    """

    def __init__(
        self,
        folder: Path,
        reviews: Path,
        keys: Path | None,
        *overrides: str,
        names: tuple[str, ...] = NAMES,
        **server: object,
    ) -> None:
        self.folder, self.keys, self.names = folder, keys, names
        self.port = free_port()
        self.run = folder / "run"
        base = (f"partition.num_clients={len(names)}", "privacy.noise=seeded")
        text = SMALL.format(path=reviews)
        self.config = RunConfig.from_toml(text, [*base, *overrides])
        (folder / "scenario.toml").write_text(self.config.to_toml())
        backbone = load_backbone(self.config.model.backbone).fingerprint
        self.hash = Proposal("0" * 16, self.config.to_toml(), backbone).hash
        self.commands: list[Command] = []
        self.allow({name: self.fingerprint(name) for name in names})
        self.write_server(**server)
        for index, name in enumerate(names):
            self.write_client(name, f"share = {index}")

    def fingerprint(self, name: str) -> list[str]:
        """Returns what the allow list holds for a name."""
        if self.keys is None:
            return []
        from fedpeft.keys import certificate_fingerprint

        return [certificate_fingerprint((self.keys / f"{name}.crt").read_bytes())]

    def allow(self, clients: dict[str, list[str]]) -> None:
        """Writes the allow list, whole or not at all."""
        lines = [f"{name} = {json.dumps(prints)}" for name, prints in clients.items()]
        path = self.folder / "clients.toml"
        path.with_suffix(".new").write_text("\n".join(["[clients]", *lines, ""]))
        path.with_suffix(".new").rename(path)

    def write_server(self, **changes: object) -> None:
        """Writes ``server.toml``."""
        section = {
            "scenario": "scenario.toml",
            "output": "run",
            "address": f"127.0.0.1:{self.port}",
            "allow": "clients.toml",
            "deadline_seconds": 120,
            "heartbeat_seconds": 1,
            "status_port": 0,
            **self._transport("server"),
            **changes,
        }
        self._write("server", {"server": section})

    def write_client(
        self, name: str, data: str, limits: str = "", **changes: object
    ) -> None:
        """Writes ``NAME.toml``.

        Args:
            name: whose.
            data: the lines of its ``[data]``.
            limits: further lines of its ``[limits]``.
            changes: of its ``[client]``.
        """
        section = {
            "server": f"127.0.0.1:{self.port}",
            "name": name,
            "state": f"state-{name}",
            "accept": self.hash,
            **self._transport(name),
            **changes,
        }
        limits = f"[limits]\nseeded_noise = true\n{limits}\n"
        self._write(name, {"client": section}, f"[data]\n{data}\n{limits}")

    def server(
        self, place: str | None = None, *, action: Callable[[], None] = die
    ) -> Command:
        """Starts the server; place and action are for :func:`at`."""
        settings = str(self.folder / "server.toml")
        return self.start(["server", settings], "server", place, action)

    def client(
        self,
        name: str,
        place: str | None = None,
        *more: str,
        action: Callable[[], None] = die,
    ) -> Command:
        """Starts a client; place and action are for :func:`at`."""
        settings = str(self.folder / f"{name}.toml")
        return self.start(["client", settings, *more], name, place, action)

    def start(
        self,
        arguments: list[str],
        log: str,
        place: str | None = None,
        action: Callable[[], None] = die,
        environment: dict[str, str] | None = None,
    ) -> Command:
        """Starts any command."""
        path = self.folder / f"{log}.log"
        command = Command(arguments, path, place, action, environment)
        self.commands.append(command)
        return command

    def state(self, name: str) -> Path:
        """Returns a client's state directory."""
        return self.folder / f"state-{name}"

    def records(self) -> list[dict]:
        """Returns what the server wrote of each complete round."""
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def events(self) -> int:
        """Returns how many rounds are complete."""
        return len(self.records())

    def close(self) -> None:
        """Ends everything."""
        for command in self.commands:
            command.kill()

    def _transport(self, name: str) -> dict[str, object]:
        if self.keys is None:
            return {"insecure": True}
        return {
            "certificate": str(self.keys / f"{name}.crt"),
            "key": str(self.keys / f"{name}.key"),
            "ca": str(self.keys / "ca.crt"),
        }

    def _write(self, name: str, sections: dict[str, dict], more: str = "") -> None:
        lines = []
        for title, section in sections.items():
            lines.append(f"[{title}]")
            lines += [f"{k} = {json.dumps(v)}" for k, v in section.items()]
        text = "\n".join([*lines, more])
        (self.folder / f"{name}.toml").write_text(text)


@dataclass(frozen=True)
class Outcome:
    """What a run came to, as far as nothing that befell it may change it."""

    rounds: int
    model: torch.Tensor
    releases: dict[str, list[int]]
    spent: dict[str, float]

    @classmethod
    def of(cls, federation: Federation) -> "Outcome":
        """Reads a finished run; fails if a ledger shows a round twice."""
        result = json.loads((federation.run / "result.json").read_text())
        releases, spent = {}, {}
        for name in federation.names:
            state = federation.state(name)
            (source,) = data_sources(state)
            ledger = verify(state, source)
            rounds = [entry.round for entry in ledger.entries]
            assert len(set(rounds)) == len(rounds), f"{name} released twice: {rounds}"
            releases[name] = rounds
            spent[name] = ledger.spent(1e-5)
        model = load_file(federation.run / "model" / "adapter.safetensors")
        return cls(len(result["rounds"]), flatten(model), releases, spent)

    def assert_equal(self, other: "Outcome") -> None:
        """The same rounds, releases, epsilons, and the same model bit for bit."""
        assert self.rounds == other.rounds
        assert self.releases == other.releases
        assert self.spent == other.spent
        assert torch.equal(self.model, other.model)
