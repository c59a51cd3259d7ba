"""A task's model: frozen backbone, PEFT method and head, put together."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fedpeft.backbone import load_backbone
from fedpeft.config import RunConfig, build
from fedpeft.errors import ConfigError
from fedpeft.interfaces import Operation, PeftMethod
from fedpeft.peft import METHODS, Prompt
from fedpeft.seeds import derive_seed
from fedpeft.sharing import split_state
from fedpeft.tasks import TASKS, Task, TaskModule
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class TaskModel:
    """What training and evaluation need.

    Attributes:
        module: maps a batch's inputs to logits.
        operations: of all trainable parameters, the head's last.
        task: makes batches, losses and metrics for it.
        fingerprint: of the backbone, before anything was added.
        adapter_constants: what the method added and does not train, parameters and
            buffers, such as LoRA's frozen A or VeRA's random matrices: equal at all
            clients, and part of the result. On the CPU, as it was built; once where
            layers share it.
        local_start: initial values of the trainable tensors that stay at their client,
            equal at all of them; empty where all travel. See ``fedpeft.sharing``.
    """

    module: TaskModule
    operations: list[Operation]
    task: Task
    fingerprint: str
    adapter_constants: Tensors
    local_start: Tensors = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    @property
    def num_backbone_parameters(self) -> int:
        """The number of frozen values."""
        return sum(p.numel() for p in self.module.parameters() if not p.requires_grad)


def build_model(config: RunConfig, num_labels: int) -> TaskModel:
    """Builds the model that a configuration describes, on the GPU where there is one.

    **Guarantees**: two processes with the same configuration build identical models:
    the adapters' initial values depend on the run's seed alone.

    Raises:
        ConfigError: if the method does not fit the backbone, or nothing would train.
    """
    backbone = load_backbone(config.model.backbone, config.model.task)
    task = TASKS[config.model.task].of(backbone, config.data)
    method = build(METHODS, config.peft, "peft")
    given = [*_tensors(backbone.module), *_tensors(backbone.output)]
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.run.seed, "adapter"))
        operations = _attach(method, backbone.module, config.peft.name)
        _check_room(config, backbone.module, method)
        module = task.build(backbone, num_labels)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(
            f"[peft]: {config.peft.name} does not fit: expected something that trains "
            f"beside {config.model.task}, which has no head, got nothing: choose "
            "another method."
        )
    constants = _constants(module, given)  # before a move, which makes new buffers
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    model = TaskModel(
        module,
        [*operations, *module.head_operations],
        task,
        backbone.fingerprint,
        constants,
    )
    _, local = split_state(trainable_state(model), config.peft.share)
    return replace(model, local_start=local)


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


def _tensors(module: nn.Module | None) -> list[torch.Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _constants(module: nn.Module, given: list[torch.Tensor]) -> Tensors:
    """Returns copies of what is frozen and was not given, by name."""
    known = {id(tensor) for tensor in given}
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if id(tensor) not in known and not tensor.requires_grad
    }


def trainable_state(model: TaskModel) -> Tensors:
    """Returns a copy of every parameter that requires a gradient."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad
    }


def shared_state(model: TaskModel) -> Tensors:
    """Returns a copy of what travels: all of it, but for what stays at its client."""
    state = trainable_state(model)
    return {name: t for name, t in state.items() if name not in model.local_start}


def local_state(model: TaskModel) -> Tensors:
    """Returns a copy of what stays at its client."""
    state = trainable_state(model)
    return {name: state[name] for name in model.local_start}


def load_trainable_state(model: TaskModel, state: Tensors) -> None:
    """Puts a trainable state into the model.

    What stays at its client and is not in `state` takes its initial values.

    Raises:
        ValueError: if the names are not exactly the trainable parameters'.
    """
    own = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    state = {**model.local_start, **state}
    if own.keys() != state.keys():
        raise ValueError(
            f"Expected {len(own)} trainable tensors, got {len(state)} others: the "
            "state belongs to another method or backbone."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
