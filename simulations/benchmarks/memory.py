"""Does memory grow with the number of clients? Peak of a whole run with 20 and 200.

Each run is a process of its own, the same cohort a round, the data spread over more
clients. A client between rounds should be nothing but files.
"""

import argparse
import json
import subprocess
import sys

COUNTS = (20, 200)
_RUN = """
import sys, tempfile
from pathlib import Path
from fedpeft.config import RunConfig
from simulations.engine import simulate
from fedpeft.scenarios import find_scenario
overrides = [
    f"partition.num_clients={sys.argv[1]}", "cohort.size=6", "run.rounds=3",
    "run.workers=0", "run.evaluate_every=3", "data.nominal_examples=48",
    "training.batch_size=24", "peft.first_layer=5",
]
config = RunConfig.from_file(find_scenario("text_reviews"), overrides)
with tempfile.TemporaryDirectory() as folder:
    print(simulate(config, Path(folder) / "run")["peak_memory_bytes"])
"""


def measure() -> dict[str, float]:
    """Returns peak bytes for each number of clients, and their ratio."""
    peaks = {count: _peak(count) for count in COUNTS}
    few, many = (peaks[count] for count in COUNTS)
    return {**{f"clients_{n}": p for n, p in peaks.items()}, "ratio": many / few}


def _peak(clients: int) -> int:
    command = [sys.executable, "-c", _RUN, str(clients)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure()
    print(json.dumps(result, indent=2) if arguments.json else result)


if __name__ == "__main__":
    main()
