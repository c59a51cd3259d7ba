"""Few at a time, but nobody waits for ever."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Bounds how many do a thing at once, as long as they are quick.

    Who has waited for long goes ahead all the same: the bound spares memory, and slow
    ones, who keep their turns, must not hold up the others for it.

    Args:
        number: of turns.
        patience_seconds: that anyone waits for one.
    """

    def __init__(self, number: int, patience_seconds: float) -> None:
        self._free = asyncio.Semaphore(number)
        self._patience_seconds = patience_seconds

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Waits for a turn, and gives it back at the end."""
        try:
            async with asyncio.timeout(self._patience_seconds):
                await self._free.acquire()
        except TimeoutError:
            yield
            return
        try:
            yield
        finally:
            self._free.release()
