"""Gaussian noise made ahead of need, by a thread of the host, for a GPU's sake."""

import contextlib
import queue
import threading
from collections.abc import Iterator

import torch

from fedpeft.privacy.randomness import Randomness, SeededRandomness

_AHEAD = 2
"""Vectors kept ready, beside the one in use and the one being made."""


class NoiseAhead(Randomness):
    """Hands out vectors of one size that a thread has made before.

    A keystream costs a processor about as long as a small model's step costs a GPU;
    made ahead, it costs the step a copy from pinned memory.

    **Guarantees**: the values are `source`'s, each handed out once. What is left over
    is dropped. An error in the thread is raised where its value would have been used.

    Args:
        source: safe to use from two threads, as ``SecureRandomness`` is; a seeded one
            is refused.
        size: of the vectors made ahead; others are made on demand.
        count: how many are made.
    """

    def __init__(self, source: Randomness, size: int, count: int) -> None:
        self._source = source
        self._size = size
        self._left = count
        self._ready: queue.Queue[torch.Tensor | Exception] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(count,), daemon=True)
        if isinstance(source, SeededRandomness):
            raise ValueError(
                "Expected a source that two threads may share, got a seeded one: its "
                "order of draws would be lost."
            )

    def uniform(self, count: int) -> torch.Tensor:
        """Returns uniform values of the source."""
        return self._source.uniform(count)

    def gaussian(self, count: int) -> torch.Tensor:
        """Returns a vector made ahead if it is of that size, else a new one."""
        if count != self._size or not self._left:
            return self._source.gaussian(count)
        if not self._thread.is_alive() and self._ready.empty():
            self._thread.start()  # with the first draw: many requests need none
        self._left -= 1
        value = self._ready.get()
        if isinstance(value, Exception):
            self._left = 0
            raise value
        return value

    def close(self) -> None:
        """Ends the thread and drops what it made."""
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)

    def _make(self, count: int) -> None:
        pin = torch.cuda.is_available()
        for _ in range(count):
            if self._stopped.is_set():
                return
            try:
                value = self._source.gaussian(self._size)
                self._ready.put(value.pin_memory() if pin else value)
            except Exception as error:
                self._ready.put(error)
                return


@contextlib.contextmanager
def noise_ahead(source: Randomness, size: int, count: int) -> Iterator[NoiseAhead]:
    """Gives a :class:`NoiseAhead` and ends its thread afterwards."""
    ahead = NoiseAhead(source, size, count)
    try:
        yield ahead
    finally:
        ahead.close()
