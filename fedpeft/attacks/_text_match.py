"""Whether a sentence explains an update: what a client that held it would have sent."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedpeft.attacks._reading import local_steps, rates, read
from fedpeft.attacks.attack import Knowledge, Seen
from fedpeft.data import Encoded
from fedpeft.model import load_trainable_state, shared_state
from fedpeft.tensors import Tensors, subtract


@dataclass(frozen=True, eq=False)
class TextMatch:
    """Compares what sentences would have led to with what was seen in a round.

    Tensor by tensor, by the cosine: no tensor outweighs the others, and what scales a
    whole gradient, such as clipping, does not matter. Entries that a compressor left
    out are not compared. Local steps are simulated, all of them.

    Attributes:
        knowledge: the model, and how clients train.
        seen: one round of one client.
        relative_noise: that each tensor is known to carry.
        label: of the sentence.

    Source: Geiping et al. (2020), Inverting Gradients, arXiv:2003.14053, section 4;
    by tensor, ours.
    """

    knowledge: Knowledge
    seen: Seen
    relative_noise: float
    label: torch.Tensor

    def of(self, sentence: torch.Tensor) -> float:
        """Returns the mean cosine, -1 to 1; 1 for a perfect explanation."""
        update = self._simulate(sentence)
        sent = Seen(self.seen.server_round, self.seen.state, update)
        mine = read(sent, self.knowledge)
        theirs = read(self.seen, self.knowledge, self.relative_noise)
        cosines = [
            _cosine(mine.values[name], theirs.values[name])
            for name, observed in self.seen.update.items()
            if bool((observed != 0).any())
        ]
        return float(torch.stack(cosines).mean()) if cosines else 0.0

    def _simulate(self, sentence: torch.Tensor) -> Tensors:
        """Trains on the sentence as a client would, and returns the update."""
        model, section = self.knowledge.model, self.knowledge.config.training
        load_trainable_state(model, self.seen.state)
        model.module.eval()
        groups = rates(self.knowledge, self.seen.server_round)
        weight_decay = section.weight_decay
        if section.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=1.0, momentum=section.momentum, weight_decay=weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=weight_decay)
        batch = model.task.collate(Encoded([sentence], self.label[None]), [0])
        for _ in range(local_steps(self.knowledge.config)):
            optimizer.zero_grad()
            losses = model.task.losses(model.module, batch.to(model.device))
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return subtract(shared_state(model), self.seen.state)


def _cosine(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    kept = theirs != 0
    return F.cosine_similarity(mine[kept], theirs[kept], dim=0)
