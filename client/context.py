"""What a Flower context says: a run's configuration and directories, and who one is.

Our own runtimes hand the configuration over whole. Under Flower's engines, whose run
configuration is a flat table of short values, both sides read the same scenario and
change it in the same way; its hash stands in every request, so a difference is refused.
"""

import re
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, InvalidPayload
from fedpeft.scenarios import find_scenario


def configuration(context: Context) -> str:
    """Returns the run's configuration, as TOML.

    The context's ``run_config`` holds it as ``config``; or it holds ``scenario`` (a
    shipped name or a path) and ``set``, overrides as one line.

    Raises:
        ConfigError: if there is no such scenario, or it is not valid.
    """
    settings = context.run_config
    if "config" in settings:
        return str(settings["config"])
    path = find_scenario(str(settings["scenario"]))
    return RunConfig.from_file(path, overrides(str(settings["set"]))).to_toml()


def overrides(line: str) -> list[str]:
    """Splits ``section.key=value section.key=value``; values may hold spaces.

    >>> overrides("run.rounds=2 data.labels=['a', 'b']  peft={name='lora', rank=2}")
    ['run.rounds=2', "data.labels=['a', 'b']", "peft={name='lora', rank=2}"]
    >>> overrides("")
    []
    """
    parts = re.split(r"\s+(?=\w+(?:\.[\w.]+\s*=|\s*=\s*\{))", line.strip())
    return [part for part in parts if part]


def run_id(context: Context) -> str:
    """Returns what ledgers and messages call a run that Flower started."""
    return f"{context.run_id:016x}"


def run_directory(context: Context) -> Path:
    """Returns ``output`` of the ``run_config``, or a directory named by the run."""
    output = str(context.run_config["output"])
    return Path(output) if output else Path("runs") / f"flwr-{run_id(context)}"


def state_directory(context: Context) -> Path:
    """Returns the directory of this client's ledger and outbox.

    It is the node's own ``state``. In a simulation it is that of the ``run_config`` or
    of the scenario's ``[run] state``, else the run directory.

    Raises:
        ConfigError: if the node holds records of its own, and no ``state`` for them.
    """
    node, settings = context.node_config, context.run_config
    if "state" in node:
        return Path(str(node["state"]))
    if node.get("data"):
        raise ConfigError(
            "Expected state beside data in the node's configuration, got none: a "
            "directory that the server chooses would be empty whenever it likes."
        )
    if "state" in settings:
        return Path(str(settings["state"]))
    state = RunConfig.from_toml(configuration(context)).run.state
    return Path(state).expanduser() if state else run_directory(context)


def introduction(context: Context) -> RecordDict:
    """Returns what a client says when it is asked which one it is."""
    index = int(context.node_config["partition-id"])
    return RecordDict({"client": ConfigRecord({"index": index})})


def read_introduction(record: RecordDict) -> int:
    """Returns the index of :func:`introduction`.

    Raises:
        InvalidPayload: for another content.
    """
    client = record.get("client")
    index = client.get("index") if isinstance(client, ConfigRecord) else None
    if type(index) is not int:
        raise InvalidPayload("Expected the index of a client.")
    return index
