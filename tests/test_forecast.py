"""A forecast's tables and pictures: never an epsilon without what it is about."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedpeft.errors import RunError
from fedpeft.forecast import SUFFIXES, check_path, draw, tables
from fedpeft.planner import Forecast, forecast
from fedpeft.privacy import make_plan
from tests.helpers import small_config

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture(scope="module")
def expected() -> Forecast:
    config = small_config(
        Path("reviews.csv"),
        "privacy.unit=client",
        "cohort.sampling=fixed",
        "privacy.adaptive_clipping.count_noise=10",
    )
    plan = make_plan(config)
    assert plan is not None
    return forecast(config, plan, inverse=True)


def test_tables_name_unit_and_relation_wherever_they_say_epsilon(
    expected: Forecast,
) -> None:
    console = Console(file=io.StringIO(), width=80)
    for part in tables(expected):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("epsilon (client,") == 4  # three curves and the allowances
    assert text.count("epsilon planned (client,") == 1
    assert text.count("replace-one)") == 5
    assert text.count("* ") == 5  # the plan's rows, and what the sign means
    assert "fixed, rate 0.5" in text
    assert "count within the norm" in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_is_drawn_in_the_format_of_its_suffix(
    expected: Forecast, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"budget{suffix}"
    check_path(path)
    draw(expected, path)
    assert path.read_bytes().startswith(MAGIC[suffix])


def test_a_picture_says_what_its_epsilon_is_about(
    expected: Forecast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    draw(expected, tmp_path / "budget.svg")
    text = (tmp_path / "budget.svg").read_text()
    assert "Privacy of one client (replace-one) at delta 1e-05" in text
    for quantity in ("rounds", "noise multiplier", "cohort size"):
        assert f">{quantity}<" in text


@pytest.mark.parametrize("name", ["budget.jpg", "budget", "png"])
def test_another_suffix_is_refused(name: str) -> None:
    with pytest.raises(RunError, match=r"ends in \.png, \.svg, \.pdf, got"):
        check_path(Path(name))
