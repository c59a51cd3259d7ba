"""The transport's benchmark on next to nothing: real processes, real keys."""

import pytest

from simulations.benchmarks.transport import federation, growth_bytes, round_seconds


@pytest.mark.slow
def test_a_federation_of_processes_answers_over_tls() -> None:
    with federation(2) as grid:
        assert grid.connected() == ["client-000", "client-001"]
        assert 0 < round_seconds(grid, b"", repeats=1) < 10
        assert growth_bytes(grid, bytes(1000)) < 64 << 20
