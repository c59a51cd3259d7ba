"""The gallery: public records beside what attacks read of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fedpeft.audit.page.spread_figures import title
from fedpeft.audit.reading import headline
from fedpeft.audit.results import AttackResult, Column, Exhibit
from fedpeft.audit.wording import metric_words, short

_LONGEST = 400
"""Letters of a text; the rest is cut off."""

_PLACES = {3: ("Best read", "Median", "Worst read"), 2: ("Best read", "Worst read")}


@dataclass(frozen=True)
class Wall:
    """What there is to see of one attack.

    Attributes:
        column: of evidence.
        caption: one sentence.
        unit: of the scores.
        exhibits: each with its place among all victims, the best read first.
    """

    column: Column
    caption: str
    unit: str
    exhibits: tuple[tuple[str, Exhibit], ...]


def walls(results: Sequence[AttackResult]) -> list[Wall]:
    """Returns the gallery of every attack that has something to look at."""
    found = []
    for result in results:
        metric, exhibits = headline(result), result.exhibits
        if not exhibits or metric is None:
            continue
        places = _PLACES.get(len(exhibits), len(exhibits) * ("Read",))
        found.append(
            Wall(
                result.column,
                f"{title(result, results)}: {metric_words(metric)}.",
                result.units[metric],
                tuple(zip(places, exhibits, strict=True)),
            )
        )
    return found


def marked(guess: str, truth: str) -> list[tuple[str, bool]]:
    """Returns a guess in pieces: words that the truth has, as often as it has them.

    Their order does not count. A long guess is cut off.

    >>> marked("the the sea blue", "blue is the sea")
    [('the', True), ('the', False), ('sea blue', True)]
    """
    left = Counter(truth.split())
    words = []
    for word in short(guess, _LONGEST).split():
        words.append((word, left[word] > 0))
        left[word] -= 1
    return [
        (" ".join(word for word, _ in group), right)
        for right, group in groupby(words, key=lambda pair: pair[1])
    ]
