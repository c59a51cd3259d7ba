"""What the head's own gradient gives away: labels, and what the head read.

The head is trained whatever the method. With cross-entropy, its bias has the gradient
``p - y`` and row c of its weight ``(p_c - y_c) f``: the bias shows the labels, and the
ratio of the two the feature f, exactly for one record, nearly for one a class. Nothing
of a feature is readable, but it tells records apart: whoever holds a list of people
picks the one whose feature it is.

Source: Zhao et al. (2020), iDLG, arXiv:2001.02610, section 3, for labels; Geiping et
al. (2020), arXiv:2003.14053, proposition 3.1, for the ratio.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fedpeft.attacks._inputs import kept_inputs
from fedpeft.attacks._reading import Reading, read
from fedpeft.attacks._simulated import labels_of
from fedpeft.attacks.attack import (
    Attack,
    Knowledge,
    Observation,
    Scores,
    Secret,
    Seen,
)
from fedpeft.attacks.threats import ThreatModel
from fedpeft.data import Encoded
from fedpeft.model import TaskModel


@dataclass(frozen=True, eq=False)
class HeadGuess:
    """What the head told, and where it is looked up.

    Attributes:
        labels: of the records, shape ``(n,)``.
        features: one a label, up to its length, shape ``(n, features)``.
        model: that everybody builds.
        seen: the round of which this is.
        is_of_cohort: whether the records are a whole cohort's.
    """

    labels: torch.Tensor
    features: torch.Tensor
    model: TaskModel
    seen: Seen
    is_of_cohort: bool


@dataclass(frozen=True)
class HeadLeak(Attack[HeadGuess]):
    """Reads the first round that was seen.

    **Not guaranteed**: features of several records of one class; what is found is then
    a mixture of theirs. Of an aggregate labels are not scored: all classes of a cohort
    are among them, and none is anybody's.

    Attributes:
        num_records: how many a client is believed to train on in a round; None takes
            the configuration's nominal number.
    """

    num_records: int | None = None

    needs: ClassVar[ThreatModel] = ThreatModel("A", "aggregate", "identify")
    undoes_optimizer: ClassVar[bool] = True
    metrics: ClassVar[dict[str, str]] = {
        "identification_top1": "share",
        "label_accuracy": "share",
        "feature_cosine": "",
    }

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Wants a head over classes, of which each record has one."""
        if _head(knowledge.model) is None:
            return "the model has no head with a bias"
        if knowledge.config.data.multi_label:
            return "its records have several labels"
        return None

    def run(self, observation: Observation, rng: torch.Generator) -> HeadGuess:
        """Returns labels and features."""
        del rng  # nothing is drawn
        knowledge, seen = observation.knowledge, observation.seen[0]
        number = self.num_records or knowledge.config.nominal_units or 1
        labels = labels_of(knowledge, seen, number)
        if labels is None:  # the head does not travel
            labels = torch.zeros(number, dtype=torch.int64)
        reading = read(seen, knowledge)
        features = _features_of(reading, knowledge.model, labels)
        of_cohort = knowledge.sees_aggregates
        return HeadGuess(labels, features, knowledge.model, seen, of_cohort)

    def score(self, guess: HeadGuess, secret: Secret) -> Scores:
        """Looks records up among the decoys; of each the nearest feature counts."""
        own, others = _known_features(guess, secret)
        best = _cosines(own, guess.features).amax(1)
        rivals = _cosines(others, guess.features).amax(1)
        first = (best[:, None] > rivals).all(1)
        scores = {
            "identification_top1": first.double(),
            "feature_cosine": best.double(),
        }
        return scores | _label_scores(guess, secret)

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Scores one of N by lot, the commonest label, and the mean public feature."""
        del rng  # what a lot gives on average is known
        knowledge = observation.knowledge
        surrogate, truth = knowledge.surrogate, secret.examples.labels
        common = torch.tensor(0) if surrogate is None else surrogate.labels.mode()[0]
        guess = HeadGuess(
            common.expand(len(truth)),
            torch.zeros(0),
            knowledge.model,
            observation.seen[0],
            knowledge.sees_aggregates,
        )
        own, others = _known_features(guess, secret)
        mean = (
            others.mean(0, keepdim=True) if len(others) else torch.zeros_like(own[:1])
        )
        chance = 1 / (1 + len(others))
        scores = {
            "identification_top1": torch.full((len(truth),), chance).double(),
            "feature_cosine": _cosines(own, mean)[:, 0].double(),
        }
        return scores | _label_scores(guess, secret)


def _head(model: TaskModel) -> tuple[str, str, str] | None:
    """Returns the names of the last layer, its weight and its bias."""
    if not model.module.head_operations:
        return None
    layer = model.module.head_operations[-1].module
    if getattr(layer, "bias", None) is None:
        return None
    name = next(name for name, part in model.module.named_modules() if part is layer)
    return name, f"{name}.weight", f"{name}.bias"


def _features_of(
    reading: Reading, model: TaskModel, labels: torch.Tensor
) -> torch.Tensor:
    """Returns what the head read for each label, up to its length.

    One record is read from all rows at once, by least squares; of several each from the
    row of its class.
    """
    names = _head(model)
    assert names is not None
    if names[1] not in reading.values:
        return torch.zeros(len(labels), 1, dtype=torch.float64)
    weight, bias = (reading.values[name] for name in names[1:])
    if len(labels) == 1:
        return (bias @ weight)[None]
    return weight[labels] * bias[labels].sign()[:, None]


def _known_features(
    guess: HeadGuess, secret: Secret
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the head is given for the records and the decoys, as sent."""
    names = _head(guess.model)
    assert names is not None

    def features(examples: Encoded) -> torch.Tensor:
        rows = kept_inputs(guess.model, guess.seen.state, names[:1], examples)
        return torch.cat([tensors[0] for tensors in rows])

    own = features(secret.examples)
    if secret.decoys is None or len(secret.decoys) == 0:
        return own, own[:0]
    return own, features(secret.decoys)


def _cosines(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Returns the cosine of each pair, ``(m, d)`` and ``(n, d)`` to ``(m, n)``."""
    if rows.shape[1] != others.shape[1]:  # there was no feature to read
        return torch.zeros(len(rows), len(others), dtype=torch.float64)
    return F.normalize(rows.double(), dim=1) @ F.normalize(others.double(), dim=1).t()


def _label_scores(guess: HeadGuess, secret: Secret) -> Scores:
    if guess.is_of_cohort:
        return {}
    return {"label_accuracy": _label_hits(guess.labels, secret.examples.labels)}


def _label_hits(guessed: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Returns 1 for every record whose label is left among the guesses, in turn."""
    left = guessed.tolist()
    hits = []
    for label in true.tolist():
        hits.append(float(label in left))
        if label in left:
            left.remove(label)
    return torch.tensor(hits, dtype=torch.float64)
