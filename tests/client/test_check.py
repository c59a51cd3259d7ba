"""``fedpeft client``, above all ``--check``, against a real server, over TLS."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch

from client import check, findings
from client.agreement import AcceptedPlans, Proposal
from client.answer import answer
from client.check import examine
from client.daemon import claimed
from client.messages import TrainRequest
from client.settings import (
    ClientSection,
    ClientSettings,
    LimitsSection,
    OwnDataSection,
)
from client.site import open_site
from client.terms import terms
from fedpeft import keys
from fedpeft.compression import Dense
from fedpeft.config import RunConfig
from fedpeft.errors import FedpeftError
from fedpeft.model import trainable_state
from server.allowlist import AllowList
from server.grid import GrpcGrid
from server.settings import ServerSection
from server.slots import Slots
from tests.helpers import small_config

RUN = "0123456789abcdef"
SEEDED = LimitsSection(seeded_noise=True)
ORDER = ["keys", "connection", "limits", "consent", "assets", "data", "backbone"]
ORDER += ["exposure", "step", "ledger", "budget", "disk"]


@pytest.fixture(scope="module")
def proposal(small_reviews: Path) -> Proposal:
    open_site.cache_clear()
    toml = small_config(small_reviews, "run.rounds=6").to_toml()
    return Proposal(RUN, toml, open_site(toml).model.fingerprint)


@pytest.fixture(scope="module")
def served(
    proposal: Proposal, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClientSection]:
    """A server that proposes, and the settings of the client that it knows."""
    folder = tmp_path_factory.mktemp("served")
    keys.create_ca(folder, "test")
    keys.create_server(folder, ["127.0.0.1"])
    known = keys.create_client(folder, "ward")
    (folder / "allow.toml").write_text(f'[clients]\nward = ["{known.fingerprint}"]\n')
    allow = AllowList(folder / "allow.toml")

    def pair(name: str) -> dict[str, Path]:
        paths = (folder / f"{name}.crt", folder / f"{name}.key", folder / "ca.crt")
        return dict(zip(("certificate", "key", "ca"), paths, strict=True))

    section = ServerSection(
        scenario="none",
        output=folder,
        address="127.0.0.1:0",
        allow=folder / "allow.toml",
        **pair("server"),
    )
    slots = Slots(folder / "clients.json", allow, 4)
    grid = GrpcGrid(section, proposal, allow, slots, 1 << 20)
    address = f"127.0.0.1:{grid.start()}"
    yield ClientSection(
        server=address, name="ward", state=folder / "state", **pair("ward")
    )
    grid.close(finished=False)


def _settings(
    section: ClientSection, reviews: Path, state: Path, **more: object
) -> ClientSettings:
    return ClientSettings(
        client=section.model_copy(update={"state": state}),
        data=OwnDataSection(path=reviews, text="review", label="verdict"),
        **{"limits": SEEDED, **more},
    )


def _examine(settings: ClientSettings) -> tuple[dict[str, str], list[str]]:
    """Returns what was found, by name, and what is broken, in order."""
    found = examine(settings, fetch=lambda names: None)
    details = {finding.what: finding.detail for finding in found}
    return details, [finding.what for finding in found if not finding.ok]


def test_all_is_in_order_and_nothing_is_spent(
    served: ClientSection, proposal: Proposal, small_reviews: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    details, broken = _examine(_settings(served, small_reviews, state))
    assert broken == [], details
    assert list(details) == ORDER
    assert details["keys"].startswith("of ward, until 20")
    assert details["consent"].startswith("not yet")
    assert details["data"].startswith("reviews: 2")
    assert "rotten" in details["data"]
    assert "far above the nominal 48" in details["data"]
    assert proposal.backbone[:16] in details["backbone"]
    assert "finite" in details["step"]
    assert details["ledger"] == "whole: 0 releases in 0 runs"
    assert details["budget"].startswith("0.00 spent of 8 over all runs; 3 more")
    assert [path.name for path in state.iterdir()] == ["client.lock"]


def test_every_check_survives_the_failure_of_those_before(
    served: ClientSection,
    small_reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "PATIENCE_SECONDS", 1.0)
    lost = served.model_copy(
        update={"server": "127.0.0.1:1", "key": tmp_path / "missing.key"}
    )
    details, broken = _examine(_settings(lost, small_reviews, tmp_path / "state"))
    assert broken == [what for what in ORDER if what not in ("ledger", "disk")]
    assert "missing.key" in details["keys"]
    assert details["data"] == "Not looked at: it takes the server's plan."


def test_a_server_that_is_away_is_not_waited_for(
    served: ClientSection,
    small_reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "PATIENCE_SECONDS", 1.0)
    lost = served.model_copy(update={"server": "127.0.0.1:1"})
    details, broken = _examine(_settings(lost, small_reviews, tmp_path / "state"))
    assert "keys" not in broken
    assert "Expected an answer of 127.0.0.1:1 within 1 s" in details["connection"]


def test_limits_data_and_consent_are_judged_one_by_one(
    served: ClientSection, proposal: Proposal, small_reviews: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("review,verdict\na good one,good\n")
    settings = _settings(
        served.model_copy(update={"accept": "f" * 64}),
        other,
        tmp_path / "state",
    )
    details, broken = _examine(settings)
    assert broken == ["consent", "data", "backbone", "exposure", "step"]
    assert "expected a label among 'rotten', 'fresh', got 'good'" in details["data"]
    AcceptedPlans(tmp_path / "state").accept(proposal, terms(proposal))
    settings = _settings(served, small_reviews, tmp_path / "state")
    assert _examine(settings)[0]["consent"] == "given"


def test_nothing_is_loaded_for_a_plan_beyond_the_limits(
    served: ClientSection, small_reviews: Path, tmp_path: Path
) -> None:
    settings = _settings(
        served, small_reviews, tmp_path / "state", limits=LimitsSection(max_epsilon=2)
    )
    fetched: list[str] = []
    found = {finding.what: finding for finding in examine(settings, fetched.extend)}
    assert "[limits] seeded_noise" in found["limits"].detail
    for what in ("assets", "data", "backbone"):
        reason = "Not looked at: it takes a plan within the limits."
        assert (found[what].ok, found[what].detail) == (False, reason)
    assert not found["step"].ok
    assert fetched == []


@pytest.mark.parametrize(
    ("backbone", "share", "closed"),
    [
        ("hub:evil/model", None, ["assets", "backbone"]),
        ("/srv/model", None, ["assets", "backbone"]),
        ("minilm", 0, ["data", "backbone"]),
        ("/srv/model", 0, ["assets", "data", "backbone"]),
    ],
)
def test_what_the_server_chose_is_not_touched_before_consent(
    small_reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    share: int | None,
    closed: list[str],
) -> None:
    toml = small_config(small_reviews, f"model.backbone={backbone}").to_toml()
    plan = Proposal(RUN, toml, "b" * 64)
    monkeypatch.setattr(check, "receive_proposal", lambda section: (plan, 0))
    section = ClientSection(
        server="127.0.0.1:9", name="ward", state=tmp_path, insecure=True
    )
    settings = _settings(section, small_reviews, tmp_path)
    if share is not None:
        own = OwnDataSection(share=share)
        settings = settings.model_copy(update={"data": own})
    details, broken = _examine(settings)
    assert [what for what in broken if what not in ("exposure", "step")] == closed
    for what in closed:
        assert details[what] == "Not looked at: it takes the operator's consent."
    AcceptedPlans(tmp_path).accept(plan, terms(plan))
    details, broken = _examine(settings)
    assert not any("consent" in details[what] for what in closed), details


@pytest.mark.parametrize(
    "method",
    ['{name = "mask", source = "fish", public', '{name = "ssf_pool", keys'],
)
def test_a_methods_file_is_not_touched_before_consent(
    small_reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    chosen = f'peft={method} = "/srv/x", sha256 = "{64 * "0"}"}}'
    plan = Proposal(RUN, small_config(small_reviews, chosen).to_toml(), "b" * 64)
    monkeypatch.setattr(check, "receive_proposal", lambda section: (plan, 0))
    section = ClientSection(
        server="127.0.0.1:9", name="ward", state=tmp_path, insecure=True
    )
    settings = _settings(section, small_reviews, tmp_path)
    details, broken = _examine(settings)
    assert broken == ["backbone", "exposure", "step"]
    assert details["backbone"] == "Not looked at: it takes the operator's consent."
    AcceptedPlans(tmp_path).accept(plan, terms(plan))
    assert "/srv/x, got No such file" in _examine(settings)[0]["backbone"]


def test_only_classes_are_counted(small_reviews: Path, tmp_path: Path) -> None:
    several = tmp_path / "several.csv"
    several.write_text("text,label\na,x;y\nb,y\nc,\n")
    labels = ('data.labels=["x", "y"]', "data.multi_label=true")
    config = small_config(small_reviews, *labels)
    told = findings.find_data(config, OwnDataSection(path=several))
    assert told.startswith("several: 3 rows, 1 x, 2 y;")
    notes = tmp_path / "notes.csv"
    notes.write_text("prompt,completion\na,b\n")
    table = config.model_dump(exclude_none=True)
    table["model"]["task"] = "causal-lm"
    for key in ("text", "label", "labels", "multi_label"):
        del table["data"][key]
    table["data"]["completion"] = "completion"
    config = RunConfig.model_validate(table)
    told = findings.find_data(config, OwnDataSection(path=notes))
    assert told.startswith("notes: 1 rows;")


def test_a_finding_is_a_printable_line(
    served: ClientSection, small_reviews: Path, tmp_path: Path
) -> None:
    def fetch(names: list[str]) -> None:
        raise FedpeftError("\x1b[2J" + 1000 * "x")

    found = examine(_settings(served, small_reviews, tmp_path / "state"), fetch)
    details = {finding.what: finding.detail for finding in found}
    assert details["assets"].startswith("\N{REPLACEMENT CHARACTER}[2Jxxx")
    assert all(d.isprintable() and len(d) < 600 for d in details.values())


def test_a_name_that_the_certificate_does_not_bear_is_found(
    served: ClientSection, small_reviews: Path, tmp_path: Path
) -> None:
    settings = _settings(
        served.model_copy(update={"name": "other"}), small_reviews, tmp_path / "state"
    )
    details, broken = _examine(settings)
    assert broken[:2] == ["keys", "connection"]
    assert details["keys"] == "Expected a certificate of other, got one of ward."
    assert "name-mismatch" in details["connection"]


def test_a_running_client_is_left_alone(
    served: ClientSection, small_reviews: Path, tmp_path: Path
) -> None:
    with claimed(tmp_path):
        details, broken = _examine(_settings(served, small_reviews, tmp_path))
    assert broken == ["state directory"]
    assert "Another client is running in" in details["state directory"]


def test_the_budget_left_is_what_the_ledger_leaves(
    proposal: Proposal, small_reviews: Path, tmp_path: Path
) -> None:
    own = OwnDataSection(path=small_reviews, text="review", label="verdict")
    site = open_site(proposal.toml, own.model_dump_json())
    request = TrainRequest(
        run=RUN,
        server_round=1,
        config_hash=proposal.config.hash,
        plan_hash=proposal.plan.hash,
        backbone=proposal.backbone,
        state=Dense()
        .compress(trainable_state(site.model), torch.Generator())
        .to_bytes(),
    )

    def budget(plan: Proposal, **limits: float) -> str:
        return findings.find_budget(plan, LimitsSection(**limits), tmp_path)

    assert answer(site, 0, tmp_path, request).code == "ok"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert budget(proposal).endswith("spent of 8 over all runs; 2 more rounds fit")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    another = replace(proposal, run="f" * 16)
    with pytest.raises(FedpeftError, match="Expected room for 3 more rounds"):
        budget(another)
    with pytest.raises(FedpeftError, match="One more round would exceed the budget"):
        budget(another, budget_epsilon=4.5)
    for server_round in (2, 3):
        follow = replace(request, server_round=server_round)
        assert answer(site, 0, tmp_path, follow).code == "ok"
    assert budget(proposal) == "this run's rounds are all paid for"
    assert findings.find_ledger(tmp_path) == "whole: 3 releases in 1 runs"
    next((tmp_path / "ledger").iterdir()).write_text("")
    with pytest.raises(FedpeftError, match="Expected 3 entries"):
        findings.find_ledger(tmp_path)


def _command(settings: ClientSettings, *options: str) -> subprocess.Popen[str]:
    """Starts ``fedpeft client`` with a settings file of its own."""
    path = settings.client.state.with_suffix(".toml")
    content = settings.model_dump(mode="json", exclude_none=True)
    path.write_text(tomli_w.dumps(content))
    main = "from fedpeft.cli import main; main()"
    command = [sys.executable, "-c", main, "client", str(path), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_plan_that_nobody_accepted_is_written_to_the_log_and_ends_the_client(
    served: ClientSection, proposal: Proposal, small_reviews: Path, tmp_path: Path
) -> None:
    settings = _settings(served, small_reviews, tmp_path / "state")
    process = _command(settings)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    *lines, last = err.splitlines()
    assert last.startswith("Error: Expected an accepted plan: read it above")
    messages = [json.loads(line)["message"] for line in lines]
    assert any(f"plan {proposal.hash}: protects: one ex" in m for m in messages)


def test_an_accepted_client_waits_for_work_and_ends_when_told(
    served: ClientSection, proposal: Proposal, small_reviews: Path, tmp_path: Path
) -> None:
    settings = _settings(served, small_reviews, tmp_path / "state")
    process = _command(settings, "--accept", proposal.hash)
    for line in process.stderr:
        if "connected" in json.loads(line)["message"]:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert AcceptedPlans(tmp_path / "state").holds(proposal.hash)


def test_the_check_ends_with_2_if_anything_is_broken(
    served: ClientSection, small_reviews: Path, tmp_path: Path
) -> None:
    settings = _settings(served, tmp_path / "missing.csv", tmp_path / "state")
    out, err = (process := _command(settings, "--check")).communicate(timeout=120)
    assert process.returncode == 2
    assert "missing.csv" in "".join(out.split())  # cells are wrapped
    assert (
        err.splitlines()[-1] == "Error: Not in order: data, backbone, exposure, step."
    )
    out, err = (process := _command(settings, "--accept", "yes")).communicate()
    assert process.returncode == 2
    assert err == (
        "Error: --accept: expected the 64 hex digits that were shown, got 'yes'.\n"
    )
