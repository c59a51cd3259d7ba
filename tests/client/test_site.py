"""Whose records a client trains on, and the name of their ledger."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from client.answer import answer
from client.holding import read_own, read_records
from client.messages import TrainRequest
from client.settings import OwnDataSection
from client.site import open_site
from fedpeft.compression import Dense
from fedpeft.config import RunConfig
from fedpeft.data import Completion
from fedpeft.errors import ConfigError, DataError, LedgerError
from fedpeft.model import trainable_state
from fedpeft.privacy import verify
from tests.helpers import small_config

COLUMNS = {"text": "review", "label": "verdict"}


@pytest.fixture
def reviews(small_reviews: Path, tmp_path: Path) -> Path:
    """A hospital's own copy, to which rows may be added."""
    path = tmp_path / "ward-7.csv"
    path.write_bytes(small_reviews.read_bytes())
    return path


def _rows(path: Path) -> int:
    with path.open(newline="") as file:
        return len(list(csv.DictReader(file)))


def _own(path: Path, **more: str) -> OwnDataSection:
    return OwnDataSection(path=path, **COLUMNS, **more)


def _person_level(path: Path) -> RunConfig:
    change = (
        "privacy.unit=person",
        "data.person=film",
        "data.nominal_persons=24",
        "training.batch_size=6",
    )
    return small_config(path, *change)


def test_all_rows_of_a_clients_own_file_are_its_examples(reviews: Path) -> None:
    elsewhere = small_config(Path("/nowhere/of-the-server.csv"))
    site = open_site(elsewhere.to_toml(), _own(reviews).model_dump_json())
    assert site.is_own
    for index in (0, 3):
        assert site.holding(index).source == "ward-7"
        assert len(site.holding(index).examples) == _rows(reviews)


def test_persons_are_found_by_the_clients_own_column(reviews: Path) -> None:
    config = _person_level(reviews)
    records = read_records(config, _own(reviews, person="film", source="ward"))
    assert list(records.parts) == ["ward"]
    assert len(set(records.examples.persons)) == 24
    with pytest.raises(ConfigError, match=r"\[data\] person: expected the column"):
        read_records(config, _own(reviews))


def test_an_undeclared_label_is_refused(reviews: Path) -> None:
    config = small_config(reviews, 'data.labels=["rotten", "ripe"]')
    with pytest.raises(DataError, match="expected a label among 'rotten', 'ripe'"):
        read_records(config, _own(reviews))


def test_a_scenario_on_a_named_data_set_must_declare_labels(reviews: Path) -> None:
    named = small_config(reviews).model_dump(exclude_none=True)
    for key in ("path", "text", "label", "labels", "group"):
        del named["data"][key]
    named["data"]["name"] = "rotten-tomatoes"
    with pytest.raises(ConfigError, match=r"\[data\] labels: expected the scenario"):
        read_records(RunConfig.model_validate(named), _own(reviews))
    named["data"]["labels"] = ("rotten", "fresh")
    config = RunConfig.model_validate(named)
    assert len(read_records(config, _own(reviews)).examples) == _rows(reviews)


def test_a_file_whose_name_is_no_source_takes_one(reviews: Path) -> None:
    odd = reviews.rename(reviews.with_name("ward 7 (final).csv"))
    with pytest.raises(ConfigError, match=r"got the file's, 'ward 7 \(final\)'"):
        read_records(small_config(odd), _own(odd))
    assert list(read_records(small_config(odd), _own(odd, source="w")).parts) == ["w"]


def test_a_share_is_what_the_simulated_client_holds(small_reviews: Path) -> None:
    config = small_config(small_reviews)
    everyone = read_records(config, None)
    share = read_records(config, OwnDataSection(share=2))
    source = list(everyone.parts)[2]
    assert list(share.parts) == [source]
    part = everyone.examples.subset(everyone.parts[source])
    assert share.examples.contents == part.contents
    assert torch.equal(share.examples.labels, part.labels)
    with pytest.raises(ConfigError, match="expected a part below"):
        read_records(config, OwnDataSection(share=4))


def test_what_is_no_description_of_data_is_refused() -> None:
    assert read_own("") is None
    with pytest.raises(ConfigError, match="either path or share"):
        read_own("{}")
    with pytest.raises(ConfigError, match="unknown key; did you mean 'label'"):
        read_own(json.dumps({"path": "x.csv", "lable": "y"}))


def test_the_ledger_goes_on_when_rows_are_added(reviews: Path, tmp_path: Path) -> None:
    toml, state = small_config(reviews).to_toml(), tmp_path / "state"
    site = open_site(toml, _own(reviews).model_dump_json())
    request = TrainRequest(
        run="0123456789abcdef",
        server_round=1,
        config_hash=site.config.hash,
        plan_hash=site.plan.hash,
        backbone=site.model.fingerprint,
        state=Dense()
        .compress(trainable_state(site.model), torch.Generator())
        .to_bytes(),
    )
    assert answer(site, 2, state, request).code == "ok"
    with reviews.open("a", newline="") as file:
        csv.writer(file).writerow(["a new one", "fresh", "a new film"])
    open_site.cache_clear()
    grown = open_site(toml, _own(reviews).model_dump_json())
    assert len(grown.holding(2).examples) == _rows(reviews)
    assert answer(grown, 2, state, replace(request, server_round=2)).code == "ok"
    assert [e.round for e in verify(state, "ward-7").entries] == [1, 2]
    renamed = replace(grown, holdings=(replace(grown.holding(2), source="ward-8"),))
    reply = answer(renamed, 2, state, replace(request, server_round=3))
    assert (reply.code, reply.payload) == ("ledger-refused", b"")
    with pytest.raises(LedgerError, match="belongs to ward-7, not to ward-8"):
        renamed.check_state(state)


def _instructions(path: Path, **data: str) -> RunConfig:
    table = small_config(path).model_dump(exclude_none=True)
    for key in ("text", "label", "labels", "group"):
        del table["data"][key]
    table["data"] |= data
    table["model"]["task"] = "causal-lm"
    return RunConfig.model_validate(table)


def test_prompts_are_found_by_the_clients_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("ask,answer\nhello,yes\n")
    config = _instructions(path, completion="completion")
    own = OwnDataSection(path=path, prompt="ask", completion="answer")
    records = read_records(config, own)
    assert records.examples.contents == (Completion("hello", "yes"),)
    scenario = _instructions(path, prompt="ask", completion="answer")
    same = read_records(scenario, OwnDataSection(path=path))
    assert same.examples.contents == records.examples.contents


def test_a_client_describes_its_own_labels_and_images(
    reviews: Path, tmp_path: Path
) -> None:
    path = tmp_path / "several.csv"
    path.write_text("text,label\na,rotten|fresh\n")
    config = small_config(reviews, "data.multi_label=true")
    own = OwnDataSection(path=path, label_separator="|")
    assert read_records(config, own).examples.labels.tolist() == [[1, 1]]
    with pytest.raises(
        ConfigError, match="completion: expected none, since the plan's"
    ):
        read_records(config, OwnDataSection(path=path, completion="label"))
    scans = tmp_path / "scans"
    (scans / "fresh").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(scans / "fresh/a.png")
    (scans / "fresh/b.png").write_text("no image")
    config = small_config(reviews)
    with pytest.raises(DataError, match="1 of 2 images cannot be read"):
        read_records(config, OwnDataSection(path=scans))
    records = read_records(config, OwnDataSection(path=scans, unreadable="skip"))
    assert records.examples.labels.tolist() == [1]
