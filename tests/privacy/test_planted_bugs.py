"""Planted bugs are caught: each mutation of the source makes a named test fail.

A case names a file, a line of it and what a hasty hand might make of that line, and the
test that must then fail. The mutated copy runs in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedpeft", "client", "server", "simulations", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Bug:
    """`line` becomes `mutant` in `file`; then `test` fails."""

    file: str
    line: str
    mutant: str
    test: str


BUGS = {
    "noise forgotten": Bug(
        "fedpeft/privacy/engine.py",
        "gradient = noise(total, self._deviation).float() / self._nominal_batch",
        "gradient = total.float() / self._nominal_batch",
        "privacy/test_engine.py::test_noise_has_the_planned_standard_deviation",
    ),
    "noise scaled by the batch": Bug(
        "fedpeft/privacy/engine.py",
        "gradient = noise(total, self._deviation).float() / self._nominal_batch",
        "gradient = noise(total / self._nominal_batch, self._deviation).float()",
        "privacy/test_engine.py::test_an_empty_batch_is_a_step_of_noise_alone",
    ),
    "noise reused": Bug(
        "fedpeft/privacy/randomness.py",
        "    cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16)))",
        "    cipher = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16)))",
        "privacy/test_randomness.py",
    ),
    "clip after the sum": Bug(
        "fedpeft/privacy/engine.py",
        "total = rows.clipped_sum(self._bound)",
        "total = clipped_sum(rows.dense().sum(0)[None], self._bound)",
        "privacy/test_engine.py::test_clipped_mean_equals_the_one_example_loop",
    ),
    "clip per tensor": Bug(
        "fedpeft/privacy/engine.py",
        "total = rows.clipped_sum(self._bound)",
        "total = torch.cat([clipped_sum(part, self._bound) for part in torch.split("
        "rows.dense(), [p.numel() for p in self._parameters], 1)])",
        "privacy/test_engine.py::test_clipped_mean_equals_the_one_example_loop",
    ),
    "last physical batch unclipped": Bug(
        "fedpeft/privacy/engine.py",
        "total = rows.clipped_sum(self._bound)",
        "total = rows.clipped_sum(self._bound if self._sum is None else 1e30)",
        "privacy/test_engine.py"
        "::test_physical_batches_of_every_size_make_the_same_step",
    ),
    "wrong sampling rate": Bug(
        "fedpeft/privacy/draws.py",
        "poisson_batch(len(units), plan.sampling_rate, self._randomness)",
        "poisson_batch(len(units), 0.75, self._randomness)",
        "privacy/test_ledger.py::test_batches_are_drawn_at_the_planned_rate",
    ),
    "accountant reset each round": Bug(
        "fedpeft/privacy/ledger.py",
        "epsilon((entry.composition for entry in self.entries), delta)",
        "epsilon((entry.composition for entry in self.entries[-1:]), delta)",
        "privacy/test_ledger.py::test_releases_compose_over_runs",
    ),
    "budget of the last release alone": Bug(
        "fedpeft/privacy/authorisation.py",
        "history = [entry.composition for entry in entries]",
        "history = [entry.composition for entry in entries[-1:]]",
        "privacy/test_ledger.py"
        "::test_a_second_run_is_refused_where_the_budget_is_spent",
    ),
    "empty batch skipped": Bug(
        "fedpeft/training.py",
        "            optimizer.zero_grad()",
        "            if not batch:\n                continue\n"
        "            optimizer.zero_grad()",
        "test_training.py::test_an_empty_batch_is_a_step",
    ),
    "duplicate example": Bug(
        "fedpeft/privacy/randomness.py",
        "    indices: list[int] = chosen.nonzero().flatten().tolist()",
        "    indices: list[int] = chosen.nonzero().flatten().tolist()\n"
        "    indices += indices[:1]",
        "privacy/test_randomness.py::test_batches_at_the_edges",
    ),
    "more of a person than the plan allows": Bug(
        "fedpeft/privacy/draws.py",
        "most = plan.max_examples",
        "most = None",
        "privacy/test_ledger.py"
        "::test_a_person_with_many_examples_is_drawn_with_at_most_so_many",
    ),
    "ledger written after sending": Bug(
        "fedpeft/privacy/release.py",
        "        self._outbox.put(Record(entry, payload, memory))\n"
        "        self._ledger.append(entry)\n"
        "        return self._answer(payload)",
        "        self._outbox.put(Record(entry, payload, memory))\n"
        "        return self._answer(payload)",
        "privacy/test_ledger.py::test_releases_compose_over_runs",
    ),
    "metrics of what nothing noises": Bug(
        "server/judging.py",
        "if server.runtime.local_parts is None or server.hides_clients:",
        "if server.runtime.local_parts is None:",
        "server/test_judging.py::test_at_client_level_local_parts_are_not_read",
    ),
    "weights by private counts": Bug(
        "client/answer.py",
        "num_examples=-1 if site.plan else len(holding.examples),",
        "num_examples=len(holding.examples),",
        "client/test_answer.py::test_the_number_of_examples_never_leaves_under_privacy",
    ),
    "NaN row dropping the step": Bug(
        "fedpeft/privacy/rows.py",
        "            self._zero(~finite)",
        "            return torch.zeros(sum(p.numel() for p in self.parameters))",
        "privacy/test_engine.py"
        "::test_one_more_example_moves_the_sum_by_at_most_the_norm",
    ),
    "second answer to one request": Bug(
        "client/answer.py",
        "final = release.repeat(question)",
        "final = None",
        "client/test_answer.py::test_the_same_request_is_answered_with_the_same_bytes",
    ),
    "plan read from the server": Bug(
        "client/answer.py",
        "if (request.config_hash, request.plan_hash) != (site.config.hash, plan_hash):",
        "if request.config_hash != site.config.hash:",
        "client/test_answer.py"
        "::test_a_request_that_does_not_fit_is_refused_and_costs_nothing",
    ),
    "person's rows clipped one by one": Bug(
        "fedpeft/training.py",
        "engine.accumulate(losses, _owners(part))",
        "engine.accumulate(losses)",
        "test_training.py::test_a_persons_rows_are_clipped_as_one",
    ),
    "a client's update unclipped": Bug(
        "fedpeft/privacy/client_level.py",
        "total.add_(vector, alpha=bound / length if length > bound else 1.0)",
        "total.add_(vector)",
        "privacy/test_client_level.py",
    ),
    "an empty cohort skipped": Bug(
        "server/rounds.py",
        "    if first is None and planned:",
        "    if first is None:",
        "server/test_client_level.py::test_an_empty_cohort_is_a_round_of_noise",
    ),
    "data told by the ledger's head": Bug(
        "fedpeft/privacy/release.py",
        "nonce=secrets.token_hex(16),",
        'nonce="",',
        "privacy/test_ledger.py"
        "::test_the_acknowledged_head_does_not_tell_which_data_it_speaks_of",
    ),
    "cohort size published": Bug(
        "server/rounds.py",
        "        facts = dict.fromkeys(facts)",
        "        pass",
        "server/test_client_level.py"
        "::test_who_answered_and_how_many_stays_with_the_server",
    ),
    "secret cohort drawn again": Bug(
        "server/cohort.py",
        "                return known",
        "                break",
        "server/test_client_level.py"
        "::test_a_round_that_is_tried_again_asks_the_same_clients",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_a_planted_bug_is_caught(bug: Bug, tmp_path: Path) -> None:
    for name in PACKAGES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    path = tmp_path / bug.file
    text = path.read_text()
    assert text.count(bug.line) == 1, "the line is gone: choose another"
    path.write_text(text.replace(bug.line, bug.mutant))
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--no-header",
            f"tests/{bug.test}",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr  # tests failed; not an error
