"""A TCP proxy on loopback that fails on demand."""

import contextlib
import socket
import threading
from typing import Literal

Direction = Literal["up", "down"]
"""Of the bytes: ``up`` from the client to the server."""


class Proxy:
    """Passes connections on to a port; cuts or stalls them when it is told to.

    Attributes:
        port: where it listens.
        connections: how many there have been.

    Args:
        target: the port that it passes on to; need not be open yet.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._left: dict[Direction, int] = {}
        self._flows = threading.Event()
        self._flows.set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """Ends all connections; new ones are welcome."""
        for one in list(self._open):
            _end(one)

    def cut_after(self, size: int, direction: Direction) -> None:
        """Ends the connection that carries the byte after `size` more, before it."""
        with self._lock:
            self._left[direction] = size

    @property
    def has_cut(self) -> bool:
        """Whether a cut that was ordered has happened."""
        return not self._left

    def stall(self) -> None:
        """Passes no byte on; connections stay open, and new ones are accepted."""
        self._flows.clear()

    def resume(self) -> None:
        """Passes on again, first what has waited."""
        self._flows.set()

    def close(self) -> None:
        """Ends everything."""
        self._flows.set()
        _end(self._listener)
        self._threads[0].join()  # now there will be no more connections
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        """Carries one connection, both ways, until either side or a cut ends it."""
        with (
            client,
            contextlib.suppress(ConnectionRefusedError),
            socket.create_connection(("127.0.0.1", self._target)) as server,
        ):
            self._open |= {client, server}
            up = threading.Thread(target=self._carry, args=(client, server, "up"))
            up.start()
            self._carry(server, client, "down")
            up.join()
            self._open -= {client, server}

    def _carry(
        self, source: socket.socket, sink: socket.socket, direction: Direction
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                allowed = self._allowed(len(data), direction)
                sink.sendall(data[:allowed])
                if allowed < len(data):
                    break
        _end(source)
        _end(sink)

    def _allowed(self, size: int, direction: Direction) -> int:
        """Returns how many of so many bytes may pass."""
        with self._lock:
            left = self._left.get(direction)
            if left is None:
                return size
            if size > left:
                del self._left[direction]
                return left
            self._left[direction] = left - size
            return size


def _end(one: socket.socket) -> None:
    """Wakes whoever waits for it."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
