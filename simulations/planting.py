"""Plants random strings among public records, to ask afterwards what a model keeps.

The run that trains on them is the audit's own: nothing of it is released.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from fedpeft.attacks.attack import Case, Knowledge, Observation, Secret
from fedpeft.config import RunConfig
from fedpeft.data import Completion, Encoded, Examples, load, split
from fedpeft.durable import write_atomically
from fedpeft.model import TaskModel, build_model, shared_state
from fedpeft.seeds import generator
from simulations.engine import simulate
from simulations.observing import detached

_PROMPT = "What is the number of the vault?"
_DIGITS = 8
_PLANTED = 16


def planted_cases(config: RunConfig, folder: Path) -> list[Case]:
    """Trains on records with strings among them; one case a string that was trained on.

    The control is the model before it was trained, as if it were a reference.

    Args:
        config: of a run whose completions are public.
        folder: for the records and the run.
    """
    strings = random_strings(config, _PLANTED)
    planted = with_planted(config, strings, folder / "planted.jsonl")
    trained_on = set(split(load(planted.data), planted.data).train.contents)
    model = build_model(planted, 1)
    start = shared_state(model)
    simulate(detached(planted), folder / "run")
    final = load_file(folder / "run" / "model" / "adapter.safetensors")
    knowledge = Knowledge(model, planted, references=(start,))
    released = {name: final[name] for name in start}
    # Strings that the split kept from training would be no members.
    return [
        _case(knowledge, released, string, number)
        for number, string in enumerate(strings)
        if string in trained_on
    ]


def random_strings(config: RunConfig, number: int) -> list[Completion]:
    """Returns different ones, all of the same form."""
    rng = generator(config.run.seed, "planted")
    return _strings(number, rng)


def with_planted(config: RunConfig, strings: list[Completion], path: Path) -> RunConfig:
    """Writes the run's public records and the strings, each a group of its own."""
    examples = load(config.data)
    groups = examples.groups or ("",) * len(examples)
    rows = [
        *zip(_completions(examples), groups, strict=True),
        *((string, string.completion) for string in strings),
    ]
    lines = (
        json.dumps({"prompt": c.prompt, "completion": c.completion, "group": group})
        for c, group in rows
    )
    write_atomically(path, "\n".join(lines).encode())
    changes = {
        "name": None,
        "path": str(path),
        "prompt": "prompt",
        "completion": "completion",
        "group": "group",
        "max_examples": None,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _completions(examples: Examples) -> list[Completion]:
    return [c for c in examples.contents if isinstance(c, Completion)]


def _case(
    knowledge: Knowledge,
    final: dict[str, torch.Tensor],
    string: Completion,
    number: int,
) -> Case:
    """Asks for one string among others of its form that were never planted."""
    strangers = knowledge.config.audit.decoys
    rng = generator(knowledge.config.run.seed, "candidates", number)
    others = [other for other in _strings(strangers + 1, rng) if other != string]
    asked = _encoded(knowledge.model, [string, *others[:strangers]])
    observation = Observation(knowledge, final=final, candidates=asked)
    is_member = torch.arange(len(asked)) == 0
    return Case(observation, Secret(asked.subset([0]), is_member=is_member))


def _strings(number: int, rng: torch.Generator) -> list[Completion]:
    drawn: dict[str, None] = {}
    while len(drawn) < number:
        digits = torch.randint(0, 10, (_DIGITS,), generator=rng).tolist()
        drawn["".join(map(str, digits))] = None
    return [Completion(_PROMPT, digits) for digits in drawn]


def _encoded(model: TaskModel, strings: list[Completion]) -> Encoded:
    labels = torch.zeros(len(strings), dtype=torch.int64)
    return model.task.encode(Examples(tuple(strings), labels, None, ("",)))
