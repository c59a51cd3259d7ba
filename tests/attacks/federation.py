"""A federation in memory: a tiny BERT, random sentences, one step a client."""

import dataclasses
from collections.abc import Sequence

import torch

from fedpeft.attacks.attack import Case, Knowledge, Observation, Secret, Seen
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.interfaces import PeftMethod
from fedpeft.model import TaskModel, load_trainable_state, trainable_state
from fedpeft.peft import METHODS
from fedpeft.privacy import NonPrivate
from fedpeft.tasks import TextClassification, TextClassifier
from fedpeft.tensors import Tensors, add, scale
from fedpeft.training import train_locally
from tests.helpers import VOCABULARY, tiny_bert

TOML = """
[run]
rounds = 3
[data]
name = "rotten-tomatoes"
nominal_examples = 1
[partition]
name = "iid"
num_clients = 4
[model]
backbone = "minilm"
[peft]
name = "lora"
[training]
optimizer = "sgd"
learning_rate = 0.3
batch_size = 1
[cohort]
size = 4
[privacy]
unit = "none"
"""
"""Only its training section is read: the model is given."""


class _Tokenizer:
    pad_token_id = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Calls every word by its number; 1 and 2 begin and end a text."""
        assert skip_special_tokens
        return " ".join(f"w{number}" for number in ids if number not in (1, 2))


def small_config(*overrides: str) -> RunConfig:
    return RunConfig.from_toml(TOML, overrides)


def small_model(name: str, *, head: bool = True, **options: object) -> Knowledge:
    """Knowledge of a tiny BERT with a method, public sentences included."""
    method: PeftMethod = METHODS[name](**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = tiny_bert()
        operations = method.attach(backbone)
        module = TextClassifier(backbone, 32, 2)
    if head:
        operations = [*operations, *module.head_operations]
    task = TextClassification(_Tokenizer(), 16)
    model = TaskModel(module, operations, task, f"tiny-{name}", {})
    return Knowledge(model, small_config(), sentences(60, seed=9))


def sentences(count: int, seed: int) -> Encoded:
    """Random words between two special tokens, 6 to 10 of them."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 11, (count,), generator=rng).tolist()
    inputs = [
        torch.cat(
            (
                torch.tensor([1]),
                torch.randint(3, VOCABULARY, (length,), generator=rng),
                torch.tensor([2]),
            )
        )
        for length in lengths
    ]
    return Encoded(inputs, torch.randint(0, 2, (count,), generator=rng))


def trained(knowledge: Knowledge, state: Tensors, examples: Encoded) -> Tensors:
    """Returns the update of one local step on all examples."""
    model, section = knowledge.model, knowledge.config.training
    engine = NonPrivate()
    engine.bind(model.module, model.operations)
    return train_locally(
        model,
        state,
        examples,
        [[[index] for index in range(len(examples))]],
        engine=engine,
        noise=lambda total, deviation: total,
        section=section,
        rate_factor=1.0,
        mask_seed=0,
    )


def start_of(knowledge: Knowledge) -> Tensors:
    """A state off the identity, so that everything has a gradient."""
    rng = torch.Generator().manual_seed(3)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=rng)
        for name, tensor in trainable_state(knowledge.model).items()
    }


def play(
    knowledge: Knowledge, state: Tensors, parts: Sequence[Encoded], rounds: int
) -> tuple[list[list[Seen]], Tensors]:
    """Plays rounds of all clients; returns each one's, and the final state."""
    seen: list[list[Seen]] = [[] for _ in parts]
    for server_round in range(1, rounds + 1):
        updates = [trained(knowledge, state, part) for part in parts]
        for mine, update in zip(seen, updates, strict=True):
            mine.append(Seen(server_round, state, update))
        for update in updates:
            state = add(state, scale(update, 1 / len(parts)))
    load_trainable_state(knowledge.model, state)
    return seen, state


def cases_of(
    knowledge: Knowledge, *, rounds: int, victims: int, strangers: int
) -> list[Case]:
    """One sentence a client, and as many public strangers to ask about."""
    parts = [sentences(1, seed=100 + client) for client in range(victims)]
    decoys = sentences(strangers, seed=50)
    seen, final = play(knowledge, start_of(knowledge), parts, rounds)
    cases, after = [], rounds + 1
    for client, part in enumerate(parts):
        others = [rounds for other, rounds in enumerate(seen) if other != client]
        observation = Observation(
            knowledge,
            tuple(seen[client]),
            tuple(map(tuple, others)),
            {**{part.server_round: part.state for part in seen[client]}, after: final},
            final,
            part.joined(decoys),
        )
        is_member = torch.arange(1 + strangers) < 1
        cases.append(Case(observation, Secret(part, decoys, is_member)))
    return cases


def without_rounds(case: Case) -> Observation:
    """The same, but for one who sees the released model alone."""
    return dataclasses.replace(case.observation, seen=(), others=())
