"""Half an hour of clients that come, go and die, and of a server that dies too.

    pytest -m soak tests/deploy/test_soak.py

``FEDPEFT_SOAK_SECONDS`` makes it shorter, ``FEDPEFT_SOAK_RESULT`` names a file for what
came out. Fifty processes share two small layers as their backbone, so that what is
loaded is the machinery, not the arithmetic.
"""

import json
import math
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from fedpeft import keys
from fedpeft.config import RunConfig
from fedpeft.privacy import data_sources, make_plan, verify
from server.checkpoint import load_checkpoint
from tests.deploy.federation import Command, Federation, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak]

SECONDS = float(os.environ.get("FEDPEFT_SOAK_SECONDS", "1800"))
RESULT = os.environ.get("FEDPEFT_SOAK_RESULT")
NAMES = tuple(f"site-{number:02d}" for number in range(50))
OVERRIDES = (
    # More than there is time for: the run must not end before the soak does.
    f"run.rounds={math.ceil(SECONDS)}",
    "partition.name=iid",
    'peft={name="lora", rank=2}',
    "cohort.size=10",
    "cohort.min_reply_share=0.1",
    "privacy.noise=secure",
)
AWAY = 0.2
"""The share of the clients that is not there, on average."""

EVENTS_A_SECOND = 0.5
SERVER_DIES = (0.1, 0.2, 0.3, 0.4, 0.97)
"""When, as shares of the time; in the longest pause it must not grow."""

WINDOW = (0.5, 0.95)
LONGEST_ROUND_SECONDS = 30.0
"""On average: the deadline, and what a busy machine adds."""

FULL_ROUNDS = 3
"""With an answer of every client asked, once all are back."""

MIB = 1 << 20
GROWTH_BYTES, GROWTH_FILES, GROWTH_THREADS = 16 * MIB, 5, 3


@dataclass(frozen=True)
class Sample:
    """The server at one moment.

    Attributes:
        seconds: since the soak began.
        memory: resident bytes.
        files: open ones, without one a client that is there.
        threads: of the process.
        clients: that are there.
        rounds: complete.
    """

    seconds: float
    memory: int
    files: int
    threads: int
    clients: int
    rounds: int


@dataclass
class Crowd:
    """The clients' processes: most are there, and every now and then one comes or goes.

    Attributes:
        here: those that run.
        counts: what happened to them.
    """

    federation: Federation
    dice: random.Random
    here: dict[str, Command] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _leaving: dict[str, Command] = field(default_factory=dict)

    def stir(self) -> None:
        """Something happens, or nothing; nobody ends who was not told to."""
        self._see_off()
        if self.dice.random() > EVENTS_A_SECOND:
            return
        away = self._away()
        if self.dice.random() < len(away) / (len(away) + AWAY * len(self.here) + 1e-9):
            self._join(self.dice.choice(away))
        elif self.here:
            name = self.dice.choice(sorted(self.here))
            command = self.here.pop(name)
            if self.dice.random() < 0.5:
                command.kill()
                self.counts["died"] += 1
            else:
                command.send_signal(signal.SIGTERM)
                self._leaving[name] = command
                self.counts["left"] += 1

    def everybody_in(self) -> None:
        """Waits for those that leave, and brings all back."""
        wait_until(lambda: self._see_off() or not self._leaving, "clients to leave")
        for name in self._away():
            self._join(name)

    def everybody_out(self) -> None:
        """All leave; none has to be killed."""
        for name, command in self.here.items():
            command.send_signal(signal.SIGTERM)
            self._leaving[name] = command
        self.here = {}
        wait_until(lambda: self._see_off() or not self._leaving, "clients to leave")

    def _away(self) -> list[str]:
        return [n for n in NAMES if n not in self.here and n not in self._leaving]

    def _join(self, name: str) -> None:
        self.here[name] = self.federation.client(name)
        self.counts["joined"] += 1

    def _see_off(self) -> None:
        for name, command in self.here.items():
            assert command.process.is_alive(), f"{name} ended: {command.output()}"
        for name, command in list(self._leaving.items()):
            if not command.process.is_alive():
                # -15: told to leave before it had come to listen to that.
                assert command.process.exitcode in (0, -15), command.output()
                del self._leaving[name]


def _tiny_backbone(folder: Path, minilm: Path) -> Path:
    """Writes a BERT of two layers with MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, small_reviews: Path, minilm: Path
) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("soak")
    backbone = _tiny_backbone(folder / "backbone", minilm)
    pairs = folder / "keys"
    keys.create_ca(pairs, "test")
    keys.create_server(pairs, ["127.0.0.1"])
    for name in NAMES:
        keys.create_client(pairs, name)
    federation = Federation(
        folder,
        small_reviews,
        pairs,
        *OVERRIDES,
        f"model.backbone={backbone}",
        names=NAMES,
        deadline_seconds=20,
        heartbeat_seconds=5,
    )
    yield federation
    federation.close()


def _look(server: Command, started: float, federation: Federation, n: int) -> Sample:
    process = Path(f"/proc/{server.process.pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines()
    )
    return Sample(
        seconds=round(time.monotonic() - started, 1),
        memory=1024 * int(status["VmRSS"].split()[0]),
        files=len(list((process / "fd").iterdir())) - n,
        threads=int(status["Threads"]),
        clients=n,
        rounds=federation.events(),
    )


def _growth(samples: list[Sample], of: Callable[[Sample], float]) -> float:
    """Returns by how much a straight line through the samples rises."""
    seconds = [sample.seconds for sample in samples]
    slope, _ = statistics.linear_regression(seconds, [of(s) for s in samples])
    return slope * (seconds[-1] - seconds[0])


def _released(federation: Federation) -> dict[str, list[int]]:
    """Returns the rounds in every ledger, as far as they are whole; each at most once.

    Clients may be at work, or have been killed at it.
    """
    released = {}
    for name in NAMES:
        lines: list[str] = []
        for path in (federation.state(name) / "ledger").glob("*.jsonl"):
            lines += path.read_text().splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        released[name] = [entry["round"] for entry in whole]
        assert len(set(released[name])) == len(whole), f"{name}: {released[name]}"
    return released


def _check_rounds(federation: Federation) -> Counter[str]:
    """What the server has counted is in the ledgers; returns what it has counted."""
    records = federation.records()  # before the ledgers: those are ahead
    charged = Counter(n for rounds in _released(federation).values() for n in rounds)
    counted: Counter[str] = Counter()
    for record in records:
        assert record["replies"] <= charged[record["round"]], record
        assert record["codes"].keys() <= {"silent", "late"}, record
        counted += Counter(record["codes"]) + Counter(replies=record["replies"])
    return counted


def _check_ledgers(federation: Federation) -> float:
    """Every ledger is whole, and the one the server knows; returns the worst epsilon.

    Nobody may be at work.
    """
    config = RunConfig.from_file(federation.run / "config.toml")
    plan, worst = make_plan(config), 0.0
    assert plan is not None
    progress = load_checkpoint(federation.run / "checkpoint", config.hash)
    for index, name in enumerate(NAMES):
        for source in data_sources(federation.state(name)):
            ledger = verify(federation.state(name), source)
            length, head = progress.acknowledged.get(index, (0, ""))
            assert length <= len(ledger.entries)
            assert not length or ledger.entries[length - 1].hash == head
            worst = max(worst, ledger.spent(plan.target_delta))
    assert 0 < worst <= plan.planned_epsilon
    return worst


def _churn(federation: Federation, crowd: Crowd) -> tuple[Command, list[Sample]]:
    """Lets them come and go for the whole time; returns the server, and its samples."""
    started, due = time.monotonic(), [share * SECONDS for share in SERVER_DIES]
    samples: list[Sample] = []
    server = federation.server()
    crowd.everybody_in()
    while (now := time.monotonic() - started) < SECONDS:
        crowd.stir()
        if due and now > due[0]:
            del due[0]
            server.kill()
            server = federation.server()
            crowd.counts["server died"] += 1
        server.says("Plan for clients to accept")
        samples.append(_look(server, started, federation, len(crowd.here)))
        if len(samples) % 10 == 0:
            _check_rounds(federation)
        time.sleep(1)
    return server, samples


def _is_whole(federation: Federation, before: int) -> bool:
    """Whether, after so many rounds, everybody asked has answered for a while."""
    records = federation.records()[before:][-FULL_ROUNDS:]
    return len(records) == FULL_ROUNDS and not any(r["failures"] for r in records)


def test_clients_and_server_come_and_go_and_the_run_goes_on(
    federation: Federation,
) -> None:
    crowd = Crowd(federation, random.Random(0))
    server, samples = _churn(federation, crowd)
    crowd.everybody_in()
    before = federation.events()
    wait_until(lambda: _is_whole(federation, before), "rounds without a failure", 600)
    server.send_signal(signal.SIGTERM)
    assert "Stopped after round" in server.ends()
    crowd.everybody_out()
    log = (federation.folder / "server.log").read_text()
    assert '"level": "ERROR"' not in log
    assert "Traceback" not in log
    first, last = (share * SECONDS for share in WINDOW)
    window = [sample for sample in samples if first < sample.seconds < last]
    growth = {
        "memory_bytes": round(_growth(window, lambda sample: sample.memory)),
        "open_files": round(_growth(window, lambda sample: sample.files), 1),
        "threads": round(_growth(window, lambda sample: sample.threads), 1),
    }
    summary = {
        "seconds": SECONDS,
        "clients": len(NAMES),
        "clients_there": round(statistics.mean(s.clients for s in samples), 1),
        "events": dict(sorted(crowd.counts.items())),
        "rounds": federation.events(),
        "answers": dict(sorted(_check_rounds(federation).items())),
        "releases": sum(map(len, _released(federation).values())),
        "spent_epsilon": _check_ledgers(federation),
        "server_memory_bytes": round(statistics.mean(s.memory for s in window)),
        "growth_while_the_server_lives": growth,
        "samples": {
            column.name: [getattr(sample, column.name) for sample in samples[::15]]
            for column in fields(Sample)
        },
    }
    if RESULT:
        Path(RESULT).write_text(json.dumps(summary, indent=2) + "\n")
    assert window[-1].rounds - window[0].rounds >= len(window) / LONGEST_ROUND_SECONDS
    assert growth["memory_bytes"] < GROWTH_BYTES
    assert growth["open_files"] < GROWTH_FILES
    assert growth["threads"] < GROWTH_THREADS
