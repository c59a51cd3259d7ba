"""Did these records take part in this update? Three ways to ask, without any shadow.

*projection*: a trained matrix W has the update ``sum_i g_i x_i^T`` over the tokens it
read. A record of the batch has its tokens in the span of the rows, as far as rows are
enough; where they are fewer than the tokens, as those of a small rank, the rows lie in
the span of the record's tokens. So whichever of both is smaller is projected onto the
other, and what is left outside is small for a member.

*cosine*: the update points where the record's own gradient descends.

*fedmia*: the cosine beside those of the other clients' updates in the same round. They
have not seen the record, so they are what a stranger's cosine looks like.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedpeft.attacks._inputs import each_input
from fedpeft.attacks._membership import MEMBERSHIP, coin_scores, membership_scores
from fedpeft.attacks.attack import Attack, Knowledge, Observation, Scores, Secret, Seen
from fedpeft.attacks.threats import ThreatModel
from fedpeft.data import Encoded
from fedpeft.model import TaskModel, load_trainable_state
from fedpeft.tensors import Tensors, flatten

_SMALLEST = 1e-6
"""Of a share that is left outside: about what single precision leaves of an update."""

_NOTHING = 1e-5
"""Of the largest singular value; below is rounding."""

_FEWEST = 2
"""Other clients' updates of a round that have a spread to compare with."""


@dataclass(frozen=True)
class UpdateMembership(Attack[torch.Tensor]):
    """One score a candidate, larger for a member; the mean over the rounds seen.

    Attributes:
        measure: ``projection``, ``cosine`` or ``fedmia``, see above. The second takes a
            backward pass a candidate, the last those of other clients' updates as well:
            rounds with fewer than two of them are passed over.
        places: matrices that are looked at for ``projection``, from the lowest: deeper
            ones cost a longer pass. The head's is the last.

    Source: the projection of few records' inputs onto a whole gradient is that of
    ProjRes, arXiv:2604.21197; the other direction, for small ranks, is ours. Li et al.
    (2023), Effective passive membership inference attacks in federated learning, for
    the cosine; Zhu et al. (2025), FedMIA, section 4, one-tailed.
    """

    measure: Literal["projection", "cosine", "fedmia"] = "projection"
    places: int = 4

    needs: ClassVar[ThreatModel] = ThreatModel("A", "aggregate", "membership")
    metrics: ClassVar[dict[str, str]] = MEMBERSHIP

    def misfit(self, knowledge: Knowledge) -> str | None:
        """Wants a matrix with fewer rows than columns for a projection."""
        if self.measure == "projection" and not self._places(knowledge.model):
            return "no trained matrix has fewer rows than its input has features"
        return None

    def unusable(self, observation: Observation) -> str | None:
        """Wants a round with three others for ``fedmia``: one more than it compares.

        In the control, whoever is asked about is none of them.
        """
        rounds = self._rounds(observation)
        if self.measure != "fedmia" or any(len(o) > _FEWEST for _, o in rounds):
            return None
        return "no round shows three other clients' updates to compare with"

    def run(self, observation: Observation, rng: torch.Generator) -> torch.Tensor:
        """Returns the scores, shape ``(candidates,)``, in doubles.

        Raises:
            ValueError: if there is nobody to ask about, or nobody to compare with.
        """
        candidates = observation.candidates
        if candidates is None:
            raise ValueError("Expected candidates to ask about, got none.")
        rounds = self._rounds(observation)
        if self.measure == "fedmia" and not rounds:
            raise ValueError(
                f"Expected a round with {_FEWEST} updates of other clients or more to "
                "compare with, got none: choose measure = 'cosine'."
            )
        model = observation.knowledge.model
        scores = [
            self._score(model, candidates, seen, others)
            for seen, others in rounds
            if any(change.any() for change in seen.update.values())
        ]
        if not scores:  # such as a round in which nothing moved
            return torch.zeros(len(candidates))
        return torch.stack(scores).mean(0)

    def _rounds(self, observation: Observation) -> list[tuple[Seen, list[Tensors]]]:
        """Returns the rounds that can be scored, each with the others' updates."""
        fewest = _FEWEST if self.measure == "fedmia" else 0
        pairs = [
            (seen, _same_round(observation.others, seen)) for seen in observation.seen
        ]
        return [(seen, others) for seen, others in pairs if len(others) >= fewest]

    def _score(
        self, model: TaskModel, candidates: Encoded, seen: Seen, others: list[Tensors]
    ) -> torch.Tensor:
        load_trainable_state(model, seen.state)
        if self.measure == "projection":
            return self._nearness(model, candidates, seen.update)
        cosines = _cosines(model, candidates, [seen.update, *others])
        if self.measure == "cosine":
            return cosines[:, 0]
        null = cosines[:, 1:]
        excess = (cosines[:, 0] - null.mean(1)) / null.std(1).clamp(min=1e-12)
        # Minus the other tail: near one, doubles would make all members equal.
        tail: torch.Tensor = torch.special.ndtr(-excess)
        return -tail

    def _nearness(
        self, model: TaskModel, candidates: Encoded, update: Tensors
    ) -> torch.Tensor:
        """Returns minus the mean logarithm of what is outside, over the matrices."""
        names = self._places(model)
        spaces = {name: _row_space(update[name]) for name in names}
        names = [name for name in names if len(spaces[name])]
        modules = [model.module.get_submodule(_module(name)) for name in names]
        scores = torch.zeros(len(candidates), dtype=torch.float64)
        if not names:
            return scores
        for index, inputs in each_input(model, modules, candidates):
            outside = [
                _outside(spaces[name], tokens.double())
                for name, tokens in zip(names, inputs, strict=True)
            ]
            scores[index] = -torch.tensor(outside).clamp(min=_SMALLEST).log().mean()
        return scores

    def _places(self, model: TaskModel) -> list[str]:
        """Returns the names of the lowest matrices with fewer rows than columns."""
        names = {id(p): name for name, p in model.module.named_parameters()}
        wide = [
            names[id(weight)]
            for operation in model.operations
            if operation.kind == "linear" and "weight" in operation.parameters
            for weight in [operation.parameters["weight"]]
            if weight.shape[0] < weight.shape[1]
        ]
        return wide[: self.places]

    def score(self, guess: torch.Tensor, secret: Secret) -> Scores:
        """See :func:`membership_scores`."""
        return membership_scores(guess, secret)

    def baseline(
        self, observation: Observation, secret: Secret, rng: torch.Generator
    ) -> Scores:
        """Throws coins."""
        return coin_scores(secret, rng)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _same_round(others: Sequence[Sequence[Seen]], mine: Seen) -> list[Tensors]:
    """Returns the other clients' updates of the same round."""
    return [
        seen.update
        for rounds in others
        for seen in rounds
        if seen.server_round == mine.server_round
    ]


def _row_space(update: torch.Tensor) -> torch.Tensor:
    """Returns an update's rows, rotated and scaled to what they weigh: ``(k, width)``.

    Not orthonormal: the singular value of a direction is how well it is known.
    """
    _, values, directions = torch.linalg.svd(update.double(), full_matrices=False)
    known = values > _NOTHING * values[0]
    rows: torch.Tensor = (values[:, None] * directions)[known]
    return rows


def _outside(rows: torch.Tensor, tokens: torch.Tensor) -> float:
    """Returns the share of the smaller space's energy that is outside of the larger.

    Args:
        rows: shape ``(k, width)``, each orthogonal to the others.
        tokens: of one record, shape ``(tokens, width)``.
    """
    small, large = (tokens, rows) if len(tokens) <= len(rows) else (rows, tokens)
    basis, _ = torch.linalg.qr(large.t())
    inside = (small @ basis).square().sum()
    return float(1 - inside / small.square().sum().clamp(min=1e-300))


def _cosines(
    model: TaskModel, candidates: Encoded, updates: Sequence[Tensors]
) -> torch.Tensor:
    """Returns each candidate's cosines with the updates, ``(candidates, updates)``.

    Of minus its gradient, in the state that the model is in.
    """
    named = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    wanted = {name: named[name] for name in updates[0]}
    directions = torch.stack([flatten(update).double() for update in updates])
    directions = torch.nn.functional.normalize(directions, dim=1)
    model.module.eval()
    cosines = []
    for index in range(len(candidates)):
        batch = model.task.collate(candidates, [index]).to(model.device)
        loss = model.task.losses(model.module, batch).sum()
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(wanted.values(), gradients, strict=True)
        ]
        descent = -torch.cat([part.reshape(-1) for part in parts]).double().cpu()
        cosines.append(directions @ (descent / descent.norm().clamp(min=1e-300)))
    return torch.stack(cosines)
