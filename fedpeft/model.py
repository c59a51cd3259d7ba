"""A task's model: frozen backbone, PEFT method and head, put together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpeft.backbone import TextClassifier, load_backbone
from fedpeft.config import RunConfig, build
from fedpeft.errors import ConfigError
from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft import METHODS, Prompt
from fedpeft.seeds import derive_seed
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class TaskModel:
    """What training and evaluation need.

    Attributes:
        module: maps ids and mask ``(batch, tokens)`` to logits ``(batch, labels)``.
        operations: of all trainable parameters, the head's last.
        tokenizer: of the backbone.
        fingerprint: of the backbone, before anything was added.
        adapter_constants: what the method added and does not train, such as LoRA's
            frozen A: equal at all clients, and part of the result.
    """

    module: TextClassifier
    operations: list[Operation]
    tokenizer: Any
    fingerprint: str
    adapter_constants: Tensors

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.module.head.weight.device

    @property
    def num_backbone_parameters(self) -> int:
        """The number of frozen values."""
        return sum(p.numel() for p in self.module.parameters() if not p.requires_grad)


def build_model(config: RunConfig, num_labels: int) -> TaskModel:
    """Builds the model that a configuration describes, on the GPU where there is one.

    **Guarantees**: two processes with the same configuration build identical models:
    the adapters' initial values depend on the run's seed alone.
    """
    backbone = load_backbone(config.model.backbone)
    method = build(METHODS, config.peft, "peft")
    given = {id(parameter) for parameter in backbone.module.parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.run.seed, "adapter"))
        operations = _attach(method, backbone.module, config.peft.name)
        _check_room(config, backbone.module, method)
        module = TextClassifier(backbone.module, backbone.hidden_size, num_labels)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    constants = {
        name: parameter.detach().cpu()
        for name, parameter in module.named_parameters()
        if id(parameter) not in given and not parameter.requires_grad
    }
    return TaskModel(
        module,
        [*operations, module.head_operation],
        backbone.tokenizer,
        backbone.fingerprint,
        constants,
    )


def _check_room(config: RunConfig, backbone: nn.Module, method: PeftMethod) -> None:
    """Refuses texts longer than the backbone has positions for.

    Before any is read: that one client's training fails would tell of its longest text.
    """
    positions = getattr(backbone.config, "max_position_embeddings", None)
    added = method.length if isinstance(method, Prompt) else 0
    if positions is not None and config.data.max_length + added > positions:
        raise ConfigError(
            f"[data] max_length: expected at most {positions - added} tokens for this "
            f"backbone{' and prompt' if added else ''}, got {config.data.max_length}."
        )


def _attach(method: PeftMethod, backbone: nn.Module, name: str) -> list[Operation]:
    try:
        return method.attach(backbone)
    except Exception as error:  # the peft library has no common type
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"[peft]: {name} does not fit: {reason}.") from None


def trainable_state(model: TaskModel) -> Tensors:
    """Returns a copy of what travels: every parameter that requires a gradient."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(model: TaskModel, state: Tensors) -> None:
    """Puts a trainable state into the model.

    Raises:
        ValueError: if the names are not exactly the trainable parameters'.
    """
    own = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        raise ValueError(
            f"Expected {len(own)} trainable tensors, got {len(state)} others: the "
            "state belongs to another method or backbone."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
