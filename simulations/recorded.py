"""What a run kept for its auditor: opened, and attacked if the truth is public."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import x25519

from client.holding import read_records as read_dealt
from fedpeft.audit.evidence import read_released
from fedpeft.audit.observing import seen_by_client
from fedpeft.audit.recording import FOLDER, Records, read_records
from fedpeft.audit.results import AttackResult
from fedpeft.config import RunConfig
from fedpeft.model import shared_state
from fedpeft.privacy import data_sources
from simulations.attacking import Say, run_attacks
from simulations.observing import Stage, cases_of


def attack_recorded(
    config: RunConfig,
    stage: Stage,
    output: Path,
    state: Path,
    key: x25519.X25519PrivateKey | None,
    say: Say,
) -> tuple[list[AttackResult], list[str]]:
    """Attacks what the run itself kept, where its data are public and it is opened.

    Args:
        config: of the run.
        stage: its replay's.
        output: the run directory.
        state: where its clients' ledgers lie.
        key: opens what was kept; None leaves it closed.
        say: is told what is being done.

    Returns:
        What the attacks achieved, and in sentences what was left closed or unread.
    """
    if key is None:
        if not (output / FOLDER).is_dir():
            return [], ["This run kept no observations; none of it was attacked."]
        return [], ["What this run kept was not opened: no auditor's key was given."]
    records = read_records(output, config.run.id or "", key)
    if not _is_known(config, state):
        return [], [
            "What this run kept opens, and was not attacked: without the clients' data "
            "nobody can say whether a guess is right."
        ]
    final = read_released(output, shared_state(stage.model))
    say("attacking what this run kept")
    attacks = run_attacks(stage, cases_of(stage, records, final), "this-run", say)
    return attacks, _unread(config, stage, records)


def _is_known(config: RunConfig, state: Path) -> bool:
    """Whether the clients' records are the public ones that the scenario deals out.

    Their ledgers say so: a simulated client's is named by the deal.
    """
    if config.data.name is None:
        return False
    held, dealt = data_sources(state), read_dealt(config, None).parts
    return bool(held) and set(held) <= set(dealt)


def _unread(config: RunConfig, stage: Stage, records: Records) -> list[str]:
    seen = seen_by_client(records, config, stage.model)
    came = sum(bool(answer.payload) for answer in records.answers)
    lost = came - sum(len(parts) for parts in seen.values())
    return [f"{lost} answers that this run kept are no updates."] if lost else []
