"""Which clients are passed over when a cohort is chosen."""

import logging
from collections import Counter
from collections.abc import Mapping

from server.runtime import Runtime

PATIENCE = 3
"""Failures in a row after which a client is set aside."""

logger = logging.getLogger(__name__)


class Standing:
    """How the clients have fared since this process began; not part of the run's state.

    Only for runs in which nothing is hidden: there, who takes part changes neither the
    guarantee of those who do nor that of those who do not.
    """

    def __init__(self) -> None:
        self._failures: Counter[int] = Counter()
        self._set_aside: dict[int, int] = {}  # client -> connections it had then

    def note(self, codes: Mapping[int, str], runtime: Runtime) -> None:
        """Takes in how each client of a cohort answered.

        Args:
            codes: client -> ``ok``, or why not.
            runtime: tells how often a client has connected.
        """
        for client, code in codes.items():
            self._failures[client] = 0 if code == "ok" else 1 + self._failures[client]
            if self._failures[client] >= PATIENCE:
                self._set_aside[client] = runtime.connections().get(client, 0)
                logger.warning(
                    "client=%s is set aside after %d failures in a row, the last %s; "
                    "it takes part again once it connects anew",
                    runtime.name(client),
                    PATIENCE,
                    code,
                    extra={"client": runtime.name(client), "code": code},
                )

    def passed_over(self, runtime: Runtime) -> set[int]:
        """Returns the clients that are busy with an old request, or set aside."""
        connections = runtime.connections()
        for client, known in list(self._set_aside.items()):
            if connections.get(client, 0) > known:
                del self._set_aside[client], self._failures[client]
        return runtime.busy() | self._set_aside.keys()
