"""Sample canaries: real examples in the run's real model, in or out by a coin.

What gradient canaries leave out is in here: the model, its own per-sample gradients,
the optimiser. The price is a looser bound, since one example's gradient is neither as
long nor as unlike the others' as the worst case that the accountant reckons with. The
more an example stands out the better: public ones with wrong labels do.

Source: Steinke, Nasr & Jagielski (2023), section 6, https://arxiv.org/abs/2305.08846;
the score: Andrew et al. (2024), https://arxiv.org/abs/2302.03098.
"""

import copy
import dataclasses
import functools
import tempfile
import time
from pathlib import Path

import torch

from fedpeft.audit.results import Check, DpTrial
from fedpeft.audit.trials.answers import CanaryClient
from fedpeft.audit.trials.mechanisms import engine_of
from fedpeft.audit.trials.whole_run import run_trials
from fedpeft.config import RunConfig
from fedpeft.data import Encoded
from fedpeft.model import TaskModel, load_trainable_state, trainable_state
from fedpeft.privacy import DpSgd, Plan
from fedpeft.privacy.draws import Draws
from fedpeft.seeds import generator
from fedpeft.tensors import Tensors, add, flatten
from fedpeft.training import example_losses, train_locally


def mislabelled(examples: Encoded, num_labels: int) -> Encoded:
    """Returns the examples, each with the label after its own.

    Where an example may have several, those that it has not are the wrong ones.

    >>> wrong = mislabelled(Encoded([torch.ones(1)] * 3, torch.tensor([0, 1, 2])), 3)
    >>> wrong.labels.tolist()
    [1, 2, 0]
    """
    labels = examples.labels
    wrong = 1 - labels if labels.dim() == 2 else (labels + 1) % num_labels
    return dataclasses.replace(examples, labels=wrong)


def sample_runs(
    config: RunConfig,
    plan: Plan,
    model: TaskModel,
    canaries: Encoded,
    *,
    seconds: float,
    seed: int,
    alpha: float,
) -> tuple[list[DpTrial], list[Check]]:
    """Trains one client on the canaries that its coins let in; a trial a round.

    A score is the cosine of the example's own gradient, where the round began, with the
    way that training went, all rounds added up. A release that notices a fault of its
    own ends it: then there is a failed check, and no trial.

    Args:
        config: of the run.
        plan: of the run, of DP-SGD.
        model: of the run; a copy of it is trained.
        canaries: public examples, at least 8; each is a unit of its own.
        seconds: no round begins later, but for the first.
        seed: of the coins.
        alpha: for each trial.
    """
    end = time.monotonic() + seconds
    trainee = _Trainee.of(config, plan, model)
    canaries = dataclasses.replace(canaries, persons=torch.arange(len(canaries)))
    coins = torch.rand(len(canaries), generator=generator(seed, "samples")) < 0.5
    present = canaries.subset(coins.nonzero().flatten().tolist())
    state, total = trainable_state(model), torch.zeros(len(canaries))
    scores: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        mine = CanaryClient(config, plan, Path(folder), 0, seed)
        for server_round in range(1, plan.max_participations + 1):
            if scores and time.monotonic() > end:
                break
            train = functools.partial(trainee.train, state, present)
            try:
                update = mine.answer(server_round, train)
            except ValueError as error:  # the release itself found something wrong
                return [], [mine.failed(error)]
            total = total + trainee.cosines(state, canaries, update)
            scores.append(total)
            state = add(state, update)
    trials = run_trials(
        "sample canaries", scores, coins, plan, seed=seed, client=0, alpha=alpha
    )
    return trials, []


@dataclasses.dataclass(frozen=True, eq=False)
class _Trainee:
    """A copy of the run's model, bound to the run's engine."""

    config: RunConfig
    plan: Plan
    model: TaskModel
    engine: DpSgd

    @classmethod
    def of(cls, config: RunConfig, plan: Plan, model: TaskModel) -> "_Trainee":
        own = copy.deepcopy(model)
        return cls(config, plan, own, engine_of(config, plan, own))

    def train(self, state: Tensors, examples: Encoded, draws: Draws) -> Tensors:
        """Returns the update of a round."""
        return train_locally(
            self.model,
            state,
            examples,
            draws.batches(examples.units(self.plan.unit == "person")),
            engine=self.engine,
            noise=draws.noise,
            section=self.config.training,
            rate_factor=1.0,
            mask_seed=draws.mask_seed(),
        )

    def cosines(
        self, state: Tensors, examples: Encoded, update: Tensors
    ) -> torch.Tensor:
        """Returns one value an example: its gradient against the update."""
        load_trainable_state(self.model, state)
        self.model.module.eval()
        section, way = self.config.training, -flatten(update)
        found = []
        for start in range(0, len(examples), section.max_physical_batch):
            end = min(start + section.max_physical_batch, len(examples))
            indices = list(range(start, end))
            losses = example_losses(self.model, examples, indices, section)
            rows = self.engine.per_sample_gradients(losses).cpu()
            found.append(torch.cosine_similarity(rows, way[None]))
        return torch.cat(found)
