"""A grid on loopback and clients made by hand, frame by frame; no model anywhere."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from flwr.app import Message

from client import fleet_pb2 as pb
from client.agreement import Proposal
from client.connection import run_client
from client.flower import from_bytes, set_identity, to_bytes
from client.messages import TrainReply, TrainRequest
from client.settings import ClientSection
from client.tls import client_credentials
from client.wire import CONNECT, Assembler, cut, our_protocol
from fedpeft.keys import create_ca, create_client, create_server
from server.allowlist import AllowList
from server.grid import GrpcGrid
from server.settings import ServerSection
from server.slots import Slots
from tests.helpers import small_config

NAMES = ("hospital-a", "hospital-b", "hospital-c")
RUN = "0123456789abcdef"
PATIENCE_SECONDS = 20.0


def wait_until(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def make_keys(folder: Path, names: Iterable[str] = NAMES) -> dict[str, str]:
    """Makes an authority and a pair for the server and each name; fingerprints."""
    create_ca(folder, "test")
    create_server(folder, ["localhost", "127.0.0.1"])
    return {name: create_client(folder, name).fingerprint for name in names}


def request(client: int, server_round: int = 1, size: int = 100) -> Message:
    set_identity()
    content = TrainRequest(RUN, server_round, "", "", "", b"?" * size).to_record()
    return Message(
        content,
        dst_node_id=client + 1,
        message_type="train",
        group_id=str(server_round),
    )


def reply_to(message: Message, data: bytes = b"!") -> Message:
    return Message(TrainReply("ok", data).to_record(), reply_to=message)


def data_of(reply: Message) -> bytes:
    return TrainReply.from_record(reply.content).payload


class Loopback:
    """A grid that listens, and everything that its clients need.

    Args:
        folder: for the allow list, the slots and the keys.
        keys: a folder that :func:`make_keys` filled, with its fingerprints; None goes
            without encryption.
        places: how many clients the run has.
        port: to listen at; 0 takes a free one.
    """

    def __init__(
        self,
        folder: Path,
        keys: tuple[Path, dict[str, str]] | None = None,
        *,
        places: int = 3,
        port: int = 0,
        heartbeat_seconds: float = 10.0,
        max_reply_bytes: int = 1 << 24,
        names: tuple[str, ...] = NAMES,
    ) -> None:
        self.folder, self.keys = folder, keys
        self.allow_file = folder / "allow.toml"
        self.allow(*names)
        config = small_config(
            folder / "reviews.csv", f"partition.num_clients={places}", f"run.id={RUN}"
        )
        self.proposal = Proposal(RUN, config.to_toml(), "backbone")
        self.section = ServerSection(
            scenario="none",
            output=folder,
            address=f"127.0.0.1:{port}",
            allow=self.allow_file,
            heartbeat_seconds=heartbeat_seconds,
            **self.pair("server"),
        )
        self.allow_list = AllowList(self.allow_file)
        self.slots = Slots(folder / "clients.json", self.allow_list, places)
        self.grid = GrpcGrid(
            self.section, self.proposal, self.allow_list, self.slots, max_reply_bytes
        )
        self.port = self.grid.start()

    def allow(self, *names: str) -> None:
        prints = self.keys[1] if self.keys else {}
        lines = [
            f'{name} = ["{prints[name]}"]' if name in prints else f"{name} = []"
            for name in names
        ]
        self.allow_file.write_text("\n".join(["[clients]", *lines, ""]))

    def pair(self, name: str) -> dict[str, object]:
        if self.keys is None:
            return {"insecure": True}
        folder = self.keys[0]
        return {
            "certificate": folder / f"{name}.crt",
            "key": folder / f"{name}.key",
            "ca": folder / "ca.crt",
        }

    def client_section(self, name: str, **options: object) -> ClientSection:
        facts = {
            "server": f"127.0.0.1:{self.port}",
            "name": name,
            "state": self.folder / name,
            **self.pair(name),
        }
        return ClientSection(**{**facts, **options})

    def by_hand(self, name: str, **options: object) -> "HandMade":
        return HandMade(self, name, **options)

    def ready(self, name: str, received: Iterable[str] = ()) -> "HandMade":
        """Returns a hand-made client that has said Hello and is ready."""
        client = self.by_hand(name)
        client.say(hello=client.hello())
        assert client.hear("welcome").run == RUN
        for message_id in received:
            client.say(received=pb.Received(message_id=message_id))
        client.say(ready=pb.Ready(accepted=self.proposal.hash))
        wait_until(lambda: name in self.grid.connected())
        return client

    def close(self, *, finished: bool = False) -> None:
        self.grid.close(finished=finished)


class HandMade:
    """One stream, of whatever the test says; frames are read one by one."""

    def __init__(
        self, loopback: Loopback, name: str, options: Iterable[tuple[str, int]] = ()
    ) -> None:
        self.name = name
        address = f"127.0.0.1:{loopback.port}"
        options = [*options, ("grpc.use_local_subchannel_pool", 1)]
        if loopback.keys is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            credentials = client_credentials(loopback.client_section(name))
            self.channel = grpc.secure_channel(address, credentials, options)
        self._frames: queue.Queue[bytes | None] = queue.Queue()
        self.call = self.channel.stream_stream(CONNECT)(iter(self._frames.get, None))

    def hello(self, **changes: object) -> pb.Hello:
        facts = {"protocol": our_protocol(), "software": "test", "name": self.name}
        return pb.Hello(**{**facts, **changes})

    def say(self, **frame: object) -> None:
        self.send(pb.ClientFrame(**frame).SerializeToString())

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._frames.put(frame)

    def hear(self, kind: str) -> object:
        """Returns the next frame, which must be of this kind."""
        frame = pb.ServerFrame.FromString(next(self.call))
        assert frame.WhichOneof("kind") == kind, frame
        return getattr(frame, kind)

    def message(self) -> Message:
        """Returns the next message."""
        assembler = Assembler(1 << 30)
        assembler.begin(self.hear("begin"), keep=True)
        while (arrival := assembler.add(self.hear("chunk"))) is None:
            pass
        return from_bytes(bytes(arrival.data or b""))

    def answer(self, message: Message, data: bytes = b"!") -> None:
        reply = to_bytes(reply_to(message, data))
        self.send(*cut(pb.ClientFrame, message.metadata.message_id, reply))

    def is_over(self) -> bool:
        """Whether the stream ends, in whatever way, without another frame."""
        try:
            return next(self.call, None) is None
        except grpc.RpcError:
            return True

    def finish(self) -> None:
        """Says no more, and waits until the server does not either."""
        self._frames.put(None)
        with contextlib.suppress(grpc.RpcError):
            list(self.call)

    def close(self) -> None:
        self._frames.put(None)
        self.call.cancel()
        self.channel.close()


class Server:
    """A server made by hand: plays a script for every stream, without encryption.

    Args:
        script: gets the client's frames, yields the server's.
    """

    def __init__(
        self, script: Callable[[Iterator[pb.ClientFrame]], Iterator[pb.ServerFrame]]
    ) -> None:
        def connect(frames: Iterator[bytes], context: object) -> Iterator[bytes]:
            del context
            for frame in script(pb.ClientFrame.FromString(data) for data in frames):
                yield frame if isinstance(frame, bytes) else frame.SerializeToString()

        _, service, method = CONNECT.split("/")
        handler = grpc.stream_stream_rpc_method_handler(connect)
        handlers = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=(handlers,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()


class Runner:
    """``run_client`` in a thread; what it raised is raised by :meth:`join`."""

    def __init__(self, section: ClientSection, **options: object) -> None:
        self.stop = threading.Event()
        self.handled: list[tuple[str, int]] = []
        self.agreed: list[tuple[Proposal, int]] = []
        self._handle = options.pop("handle", self._answer)
        self._agree = options.pop("agree", lambda *what: self.agreed.append(what))
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(section,))
        self._thread.start()

    def _answer(self, message: Message, client: int) -> Message:
        self.handled.append((message.metadata.group_id, client))
        return reply_to(message, f"of {client}".encode())

    def _run(self, section: ClientSection) -> None:
        try:
            run_client(section, self._agree, self._handle, stop=self.stop)
        except BaseException as error:
            self._error = error

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the client still runs"
        if self._error is not None:
            raise self._error
