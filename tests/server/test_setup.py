"""The server's own public data: all of it is judged on."""

from pathlib import Path

import pytest

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, DataError
from server.runtime import Runtime
from server.setup import open_server
from tests.helpers import small_config


def _open(config: RunConfig, held_out: Path, output: Path) -> int:
    run = config.run.model_copy(update={"id": "0123456789abcdef"})
    runtime = Runtime(held_out=held_out)
    server = open_server(config.model_copy(update={"run": run}), output, runtime)
    return len(server.held_out)


def _public(folder: Path, *verdicts: str) -> Path:
    path = folder / "public.csv"
    rows = [f"so it is,{verdict},a film" for verdict in verdicts]
    path.write_text("\n".join(("review,verdict,film", *rows)))
    return path


def test_a_servers_own_file_is_not_cut(small_reviews: Path, tmp_path: Path) -> None:
    config = small_config(small_reviews, "data.max_examples=2")
    path = _public(tmp_path, "fresh", "rotten", "fresh", "fresh")
    assert _open(config, path, tmp_path) == 4


def test_a_servers_own_file_needs_two_classes(
    small_reviews: Path, tmp_path: Path
) -> None:
    path = _public(tmp_path, "fresh", "fresh")
    with pytest.raises(DataError, match="two classes, all 2 are 'fresh'"):
        _open(small_config(small_reviews), path, tmp_path)


def test_an_auditors_key_that_is_none_is_found_before_any_round(
    small_reviews: Path, tmp_path: Path
) -> None:
    record = ("audit.record=true", f"audit.auditor='{64 * '0'}'")
    path = _public(tmp_path, "fresh", "rotten")
    with pytest.raises(ConfigError, match="auditor: expected a public key"):
        _open(small_config(small_reviews, *record), path, tmp_path)
