"""How much of its inputs a configuration exposes, before any data are seen.

A trained matrix of rank r that reads b tokens shows r directions of their span a round.
Matrices that read the same input add up; so do rounds, where nothing below trains and
the input stays the same. Whether that suffices is arithmetic: of the numbers of tokens,
of rows and of features, none of which depends on data. So a client may refuse because
of it without telling anything.

Source: ours; for one update, Petrov et al. (2024), arXiv:2405.15586, section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from fedpeft.attacks._patches import Patches, find_patches
from fedpeft.attacks._reading import read_all
from fedpeft.attacks._sentence import significant
from fedpeft.attacks._span import (
    Reader,
    find_readers,
    first_input,
    span_of,
    stacked_rows,
)
from fedpeft.attacks.attack import Attack, Knowledge, Observation, Scores, Secret
from fedpeft.attacks.threats import ThreatModel
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.model import TaskModel
from fedpeft.tasks import ImageClassification

Verdict = Literal["exact", "ranked", "infeasible"]


@dataclass(frozen=True)
class RankBudget:
    """How much of a client's inputs the updates of one place can span, data aside.

    Attributes:
        place: the module whose input it is.
        width: of that input.
        rows: directions seen: factors that read it, times their rank, times rounds.
        needed: positions of one batch.
        verdict: of a full batch at full length: ``exact`` (all positions lie in what
            is seen), ``ranked`` (a part of them), or ``infeasible`` (they fill all
            features). What is shorter may still be told apart.
        detail: one sentence.
    """

    place: str
    width: int
    rows: int
    needed: int
    verdict: Verdict
    detail: str


def rank_budget(model: TaskModel, config: RunConfig) -> list[RankBudget]:
    """Returns the budget of the first trained block's input; empty if none is read.

    **Guarantees**: depends on the configuration and the backbone alone.

    Args:
        model: in any trainable state.
        config: of the run. The longest texts and the nominal batch are counted, so a
            shorter text is exposed by less than is said to be needed.
    """
    readers = _readers(model, config)
    if not readers:
        return []
    shapes = {name: p.shape for name, p in model.module.named_parameters()}
    width = shapes[readers[0].name][1]
    rank = sum(min(shapes[reader.name]) for reader in readers)
    rows = rank * _participations(config)
    needed = _tokens(model, config) * config.training.batch_size
    verdict = _verdict(rows, needed, width)
    place = _place(model.module, readers[0].module)
    detail = _DETAILS[verdict].format(rows=rows, needed=needed, width=width)
    if verdict == "exact" and isinstance(model.task, ImageClassification):
        detail += " " + _uniqueness(model)
    return [RankBudget(place, width, rows, needed, verdict, detail)]


_DETAILS: Mapping[Verdict, str] = {
    "exact": "Up to {rows} directions are seen and {needed} positions fit into them, "
    "with {width} features to tell them from others.",
    "ranked": "Up to {rows} directions are seen of the {needed} that the positions of "
    "a batch need: shorter records are exposed in full, others in part.",
    "infeasible": "{needed} positions, a full batch at full length, fill all {width} "
    "features, so their span tells no input apart; shorter records, or fewer at a "
    "time, may still be told apart.",
}


def _verdict(rows: int, needed: int, width: int) -> Verdict:
    """Returns what arithmetic allows at full length.

    >>> _verdict(64, 30, 384), _verdict(16, 30, 384), _verdict(64, 400, 384)
    ('exact', 'ranked', 'infeasible')
    """
    if needed >= width:
        return "infeasible"
    return "exact" if rows >= needed else "ranked"


def _participations(config: RunConfig) -> int:
    """Returns the rounds in which one client takes part, in a rotation."""
    clients = config.partition.num_clients
    return -(-config.run.rounds * min(config.cohort.size, clients) // clients)


def _trial(model: TaskModel, config: RunConfig) -> dict[str, torch.Tensor]:
    """Returns one record made of nothing, as long as records get."""
    if isinstance(model.task, ImageClassification):
        record = torch.zeros(28, 28, dtype=torch.uint8)
    else:
        record = torch.zeros(config.data.max_length, dtype=torch.int64)
    labels = torch.zeros(1, dtype=torch.int64)
    encoded = Encoded([record], labels)
    return model.task.collate(encoded, [0]).to(model.device).inputs


def _readers(model: TaskModel, config: RunConfig) -> list[Reader]:
    model.module.eval()
    return find_readers(model.module, model.operations, _trial(model, config))


def _tokens(model: TaskModel, config: RunConfig) -> int:
    """Returns the positions of one record."""
    reader = _readers(model, config)[0]
    return int(first_input(model.module, reader, _trial(model, config)).shape[1])


def _place(module: nn.Module, part: nn.Module) -> str:
    names = {id(other): name for name, other in module.named_modules()}
    place: str = names[id(part)]
    return place


def _uniqueness(model: TaskModel) -> str:
    """Says whether tokens within their span fix the pixels too (see ``span_image``)."""
    patches = find_patches(model, 3)
    if not isinstance(patches, Patches):
        return "Pixels do not follow from tokens in closed form."
    tokens = len(patches.places) + len(patches.fixed)
    pixels = patches.weight.shape[1]
    sign = "<=" if patches.is_unique() else ">"
    verb = "fix" if patches.is_unique() else "do not fix"
    return (
        f"In colour {tokens} tokens + {pixels} pixels a patch + 1 {sign} "
        f"{patches.width} features: the tokens {verb} the pixels without a prior. "
        "Grey images have a third of the pixels."
    )


@dataclass(frozen=True)
class Exposed:
    """What was seen of the first trained block's input.

    Attributes:
        directions: that stand out of their noise.
        positions: of a record as long as records get.
    """

    directions: int
    positions: int


@dataclass(frozen=True)
class ObservedRank(Attack[Exposed]):
    """Counts the directions that updates really show; a measure, no reconstruction.

    The prior-only control is as high as the attack: what is counted hardly depends on
    whose data they are.
    """

    needs: ClassVar[ThreatModel] = ThreatModel("A", "update", "expose")
    undoes_optimizer: ClassVar[bool] = True
    metrics: ClassVar[dict[str, str]] = {"observable_share": "share"}

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Wants a trained matrix that reads tokens."""
        if not _readers(knowledge.model, knowledge.config):
            return "no trained matrix reads the tokens of the first trained block"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> Exposed:
        """Returns the number of directions beyond the noise."""
        del rng
        knowledge = observation.knowledge
        names = [r.name for r in _readers(knowledge.model, knowledge.config)]
        readings = read_all(observation.seen, knowledge)
        rows = stacked_rows(
            [reading.values for reading in readings],
            [reading.deviations for reading in readings],
            names,
        )
        count = len(significant(span_of(rows), len(rows)).values) if len(rows) else 0
        return Exposed(count, _tokens(knowledge.model, knowledge.config))

    def score(self, guess: Exposed, secret: Secret) -> Scores:
        """Sets them against the positions that the client's records fill."""
        needed = sum(
            len(record) if record.dim() == 1 else guess.positions
            for record in secret.examples.inputs
        )
        share = min(1.0, guess.directions / needed)
        return {"observable_share": _per_record(share, secret)}

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Scores nothing: without updates no direction is seen."""
        del observation, rng
        return {"observable_share": _per_record(0.0, secret)}


def _per_record(share: float, secret: Secret) -> torch.Tensor:
    return torch.full((len(secret.examples),), share, dtype=torch.float64)
