"""Who attacks, what they see, what they want: threat models as types.

The letters are those of Carletti et al. (USENIX Security 2025). Beside them stand what
is observed, whether clients check the backbone, in which form updates are released, and
the goal: a federation of adapters differs in these most.
"""

from dataclasses import dataclass
from typing import Literal

Adversary = Literal["A", "B", "C", "D", "E", "F", "G", "H"]

ADVERSARIES: dict[Adversary, str] = {
    "A": "an eavesdropper, who knows the model",
    "B": "an informed one, who also knows what such data look like in general",
    "C": "one who also knows how clients train: rate, steps, optimiser, batch",
    "D": "one who also holds public data of the same kind",
    "E": "one who also knows statistics of the client's data",
    "F": "an active one, who also changes what is sent to clients",
    "G": "an active one with public data of the same kind",
    "H": "one who also joins with clients of their own",
}
"""What each one is, for reports; a letter holds what those of `_HOLDS` do."""

_HOLDS: dict[Adversary, str] = {
    "A": "A",
    "B": "AB",
    "C": "ABC",
    "D": "ABCD",
    "E": "ABCDE",
    "F": "ABCF",
    "G": "ABCDFG",
    "H": "ABCDFGH",
}

Access = Literal["update", "updates", "aggregate", "final-model"]
"""One round's update of a client, several rounds', only what becomes of a round's
updates together, only the model."""

# An update is an aggregate of one client: an attack that needs no more can be tried.
_SHOWS: dict[Access, tuple[Access, ...]] = {
    "updates": ("updates", "update", "aggregate", "final-model"),
    "update": ("update", "aggregate"),
    "aggregate": ("aggregate", "final-model"),
    "final-model": ("final-model",),
}

Backbone = Literal["verified", "unverified"]
"""Whether clients compare the backbone with a pinned fingerprint."""

ReleaseForm = Literal["raw", "compressed", "noised", "noised-compressed"]
"""Of the update that is seen; noise comes before compression."""

Goal = Literal["reconstruct", "identify", "membership", "extract", "expose"]
"""Content, one of N, whether a record took part, a planted string, or what is open."""


@dataclass(frozen=True)
class ThreatModel:
    """What one adversary is granted, or the least that an attack needs."""

    adversary: Adversary
    access: Access
    goal: Goal
    backbone: Backbone = "verified"
    release: ReleaseForm = "raw"

    def lacks(self, needed: "ThreatModel") -> list[str]:
        """Returns what is granted less than `needed`, in words; empty if nothing.

        A release form is never lacking: noise and compression make an attack worse, and
        how much is what is measured.

        >>> mine = ThreatModel("C", "update", "reconstruct")
        >>> mine.lacks(ThreatModel("D", "updates", "membership"))
        ['adversary D', 'access updates']
        """
        lacking = []
        if needed.adversary not in _HOLDS[self.adversary]:
            lacking.append(f"adversary {needed.adversary}")
        if needed.access not in _SHOWS[self.access]:
            lacking.append(f"access {needed.access}")
        if needed.backbone == "unverified" and self.backbone == "verified":
            lacking.append("a backbone that nobody verifies")
        return lacking
