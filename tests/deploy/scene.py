"""A federation in the middle of a round, and what its server may say meanwhile."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from client import fleet_pb2 as pb
from client.settings import ClientSection
from fedpeft import keys
from tests.deploy.federation import NAMES, Command, Federation, wait_until
from tests.proxy import Proxy
from tests.transport import HandMade

ROUNDS = 6
OPTIONS = (f"run.rounds={ROUNDS}", 'peft={name="head"}', "data.max_length=16")


class Scene:
    """North has answered in round 1, which waits for east; west has no part in it.

    North's connection goes through a proxy.

    Attributes:
        expected: the beginnings of all lines that the server's log must hold.
        north: the process.
        west: the process, once there is one.

    Args:
        folder: for everything.
        reviews: the scenario's data.
    """

    def __init__(self, folder: Path, reviews: Path) -> None:
        self.folder, self.keys = folder, folder / "keys"
        keys.create_ca(self.keys, "test")
        keys.create_server(self.keys, ["127.0.0.1", "localhost"])
        for name in (*NAMES, "stranger"):
            keys.create_client(self.keys, name)
        self.federation = Federation(
            folder, reviews, self.keys, *OPTIONS, deadline_seconds=900
        )
        self.port = self.federation.port
        self.proxy = Proxy(self.port)
        address = f"127.0.0.1:{self.proxy.port}"
        self.federation.write_client("north", "share = 0", server=address)
        self.expected: list[str] = []
        self.west: Command | None = None
        self.server = self.federation.server()
        self.server.says("Plan for clients to accept")
        self._start = len(self._lines())
        with self.logs("INFO client=north joined"):
            self.north = self.federation.client("north")
            self.north.says("round=1 code=ok")

    @contextlib.contextmanager
    def logs(self, *lines: str) -> Iterator[None]:
        """The server adds these lines to its log, in order, and the round stays open.

        Args:
            lines: level and beginning of the message.
        """
        before = len(self.lines())
        self.expected += lines
        yield
        wait_until(lambda: len(self.lines()) >= before + len(lines), repr(lines), 30)
        assert_begin(self.lines()[before:], lines)
        assert self.server.process.is_alive()
        assert self.federation.events() == 0

    def lines(self) -> list[str]:
        """Level and message of all that was logged since the server listened."""
        return self._lines()[self._start :]

    def by_hand(self, name: str) -> HandMade:
        """Returns a client of which every frame is the test's."""
        return HandMade(self, name)

    def welcome(self, name: str = "west") -> HandMade:
        """Returns one to which the server has proposed the run."""
        client = self.by_hand(name)
        client.say(hello=client.hello())
        client.hear("welcome")
        return client

    def ready(self, name: str = "west") -> HandMade:
        """Returns one that has accepted."""
        client = self.welcome(name)
        client.say(ready=pb.Ready(accepted=self.federation.hash))
        return client

    def client_section(self, name: str) -> ClientSection:
        """Returns what a client made by hand needs to know."""
        return ClientSection(
            server=f"127.0.0.1:{self.port}",
            name=name,
            state=self.folder,
            certificate=self.keys / f"{name}.crt",
            key=self.keys / f"{name}.key",
            ca=self.keys / "ca.crt",
        )

    def allow(self, *names: str) -> None:
        """Has these alone on the allow list."""
        prints = {name: self.federation.fingerprint(name) for name in names}
        self.federation.allow(prints)

    def close(self) -> None:
        """Ends everything."""
        self.federation.close()
        self.proxy.close()

    def memory(self) -> int:
        """Resident bytes of the server."""
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def _lines(self) -> list[str]:
        *whole, _ = self.server.output().split("\n")  # the last may be but a part
        table = next((n for n, line in enumerate(whole) if line[0] == "\u250c"), None)
        records = [json.loads(line) for line in whole[:table]]
        return [f"{record['level']} {record['message']}" for record in records]


def assert_begin(lines: Sequence[str], beginnings: Sequence[str]) -> None:
    """Every line has its beginning, and there is no other."""
    assert len(lines) == len(beginnings), lines
    for line, beginning in zip(lines, beginnings, strict=True):
        assert line.startswith(beginning), lines
