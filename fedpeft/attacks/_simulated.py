"""What a client would have answered, had its images been these; differentiable."""

from dataclasses import dataclass

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedpeft.attacks._images import model_inputs
from fedpeft.attacks.attack import Knowledge, Seen
from fedpeft.tasks import ImageClassification
from fedpeft.tasks.classes import class_losses
from fedpeft.tensors import Tensors


@dataclass(frozen=True, eq=False)
class SimulatedClient:
    """Local training as the configuration describes it, on images that may change.

    All images are in every batch; with several batches a pass that is a guess. AdamW's
    steps are not followed: what is returned then has the direction of its first
    gradient, of which a step from fresh moments keeps the signs.

    Attributes:
        knowledge: model and configuration.
        seen: the round of which the answer is wanted.
        labels: of the images, shape ``(n,)``.
    """

    knowledge: Knowledge
    seen: Seen
    labels: torch.Tensor

    @property
    def is_adaptive(self) -> bool:
        """Whether updates keep but the signs of a gradient."""
        return self.knowledge.config.training.optimizer == "adamw"

    @property
    def _steps(self) -> int:
        section = self.knowledge.config.training
        a_pass = -(-len(self.labels) // section.batch_size)
        steps = max(1, round(section.local_epochs * a_pass))
        return 1 if self.is_adaptive else steps

    def update(self, images: torch.Tensor) -> Tensors:
        """Returns local minus global, attached to the graph of the images.

        Args:
            images: in 0..1, shape ``(n, 1 or 3, height, width)``.
        """
        section = self.knowledge.config.training
        rates = self._rates()
        start = {n: t.clone().requires_grad_() for n, t in self.seen.state.items()}
        now: Tensors = dict(start)
        speed = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for _ in range(self._steps):
            slopes = self._gradient(now, images)
            for name, slope in slopes.items():
                slope = slope + section.weight_decay * now[name]
                speed[name] = section.momentum * speed[name] + slope
            now = {name: now[name] - rates[name] * speed[name] for name in now}
        return {name: now[name] - start[name] for name in now}

    def _gradient(self, state: Tensors, images: torch.Tensor) -> Tensors:
        config = self.knowledge.config
        if not config.is_dp_sgd:
            losses = self._losses(state, images)
            return _slopes(losses.mean(), state)
        parts = [_slopes(loss, state) for loss in self._losses(state, images)]
        total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for part in parts:
            length = torch.cat([t.flatten() for t in part.values()]).norm()
            factor = (config.privacy.clipping_norm / length).clamp(max=1)
            total = {name: total[name] + factor * part[name] for name in total}
        return {name: t / config.training.batch_size for name, t in total.items()}

    def _losses(self, state: Tensors, images: torch.Tensor) -> torch.Tensor:
        model = self.knowledge.model
        assert isinstance(model.task, ImageClassification)
        inputs = {"pixel_values": model_inputs(model.task, images).to(model.device)}
        state = {name: tensor.to(model.device) for name, tensor in state.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
            logits = functional_call(model.module, state, kwargs=inputs)
        return class_losses(logits, self.labels.to(model.device)).cpu()

    def _rates(self) -> dict[str, float]:
        """Returns each tensor's learning rate in this round."""
        config, module = self.knowledge.config, self.knowledge.model.module
        section = config.training
        past = (self.seen.server_round - 1) / config.run.rounds
        factor = 1 - past if section.decay == "linear" else 1.0
        head = {id(p) for op in module.head_operations for p in op.parameters.values()}
        head_rate = section.head_learning_rate or section.learning_rate
        return {
            name: factor * (head_rate if id(p) in head else section.learning_rate)
            for name, p in module.named_parameters()
            if name in self.seen.state
        }


def _slopes(loss: torch.Tensor, state: Tensors) -> Tensors:
    slopes = torch.autograd.grad(
        loss, list(state.values()), create_graph=True, materialize_grads=True
    )
    return dict(zip(state, slopes, strict=True))


def labels_of(knowledge: Knowledge, seen: Seen, number: int) -> torch.Tensor | None:
    """Returns the labels that moved the head's bias, shape ``(number,)``.

    Its update goes up where a label was and down elsewhere, by what was predicted. None
    if no such bias travels.

    Source: Zhao et al. (2020), iDLG, arXiv:2001.02610, section 3, for one record.
    """
    biases = [
        name
        for name, p in knowledge.model.module.named_parameters()
        for op in knowledge.model.module.head_operations
        if op.parameters.get("bias") is p and name in seen.update
    ]
    if not biases:
        return None
    bias = biases[-1]
    likely = seen.state[bias].double().softmax(0)
    moved = seen.update[bias].double()
    # One record of class y moves the bias by rate * (1 at y - likely).
    counts = number * likely + number * moved / moved.clamp(min=0).sum().clamp(
        min=1e-30
    )
    labels = []
    for _ in range(number):
        labels.append(int(counts.argmax()))
        counts[labels[-1]] -= 1
    return torch.tensor(labels)
