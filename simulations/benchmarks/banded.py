"""How much less noise do correlated rounds put on the model, at the same epsilon?

Root mean square, over all prefixes of a run, of the noise on the sum of the rounds so
far: independent noise over banded matrix factorisation. Both cost what k releases of
the same noise multiplier cost, k being a client's participations, so the ratio holds
for every epsilon. ``times_less_noise`` is computed from the matrices;
``times_less_noise_drawn`` is measured on noise that was drawn and correlated, round by
round, as the server does it.
"""

import argparse
import json
import math

import torch

from fedpeft.privacy.banded import Banded, best_bands, prefix_error
from fedpeft.privacy.randomness import SeededRandomness

SETTINGS = (
    (100, 1, 100),
    (100, 5, 20),
    (100, 10, 10),
    (500, 10, 50),
    (1000, 4, 250),
    (1000, 20, 50),
)
"""Rounds, a client's participations, and the least separation of two of them."""


def measure(coordinates: int) -> list[dict[str, float]]:
    """Returns one row a setting.

    Args:
        coordinates: how many are drawn a round; 0 draws none and leaves that column
            out.
    """
    rows = []
    for rounds, participations, min_separation in SETTINGS:
        bands = best_bands(rounds, min_separation)
        ratio = prefix_error(rounds, 1) / prefix_error(rounds, bands)
        row: dict[str, float] = {
            "rounds": rounds,
            "participations": participations,
            "min_separation": min_separation,
            "bands": bands,
            "times_less_noise": round(ratio, 3),
        }
        if coordinates:
            drawn = _drawn_error(rounds, 1, coordinates)
            drawn /= _drawn_error(rounds, bands, coordinates)
            row["times_less_noise_drawn"] = round(drawn, 3)
        rows.append(row)
    return rows


def _drawn_error(rounds: int, bands: int, coordinates: int) -> float:
    """Measures what ``prefix_error`` computes."""
    banded, source = Banded(rounds, bands), SeededRandomness(0)
    state, squares = banded.init(coordinates), 0.0
    total = torch.zeros(coordinates, dtype=torch.float64)
    for server_round in range(1, rounds + 1):
        fresh = source.gaussian(coordinates)
        noise, state = banded.correlate(fresh, server_round, state)
        total += noise
        squares += float(total @ total)
    return math.sqrt(squares / (rounds * coordinates))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--coordinates", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.coordinates)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
