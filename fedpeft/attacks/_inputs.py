"""What reaches a module when records pass through the model: the truth to compare with.

Padding is left out: what is returned has one row a token of the record.
"""

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedpeft.data import Encoded, physical_batches
from fedpeft.model import TaskModel, load_trainable_state
from fedpeft.tensors import Tensors, fingerprint

_BATCH = 64

Rows = list[list[torch.Tensor]]
"""A record -> a module -> a tensor of shape ``(tokens, width)``."""

_KEPT: WeakKeyDictionary[Encoded, tuple[tuple[str, ...], Rows]] = WeakKeyDictionary()


class _Enough(Exception):
    """Everything that was asked for has been seen; what lies above is not computed."""


def inputs_of(
    model: TaskModel, modules: Sequence[nn.Module], examples: Encoded
) -> Rows:
    """Returns what every module is given for each record.

    Args:
        model: in the trainable state that matters; it is left in evaluation mode.
        modules: parts of it, each called once a pass.
        examples: the records.

    Returns:
        Per record one tensor a module, of shape ``(tokens, width)``; of one row where
        the module sees no tokens but a whole record.
    """
    rows: Rows = [[] for _ in range(len(examples))]
    for index, tensors in each_input(model, modules, examples):
        rows[index] = tensors
    return rows


def kept_inputs(
    model: TaskModel,
    state: Tensors,
    names: Sequence[str],
    examples: Encoded,
    most: int = 1 << 30,
) -> Rows:
    """Returns :func:`inputs_of` in a trainable state, and remembers the last result.

    Public records meet the same state at every victim. What is remembered goes with
    the records.

    Args:
        model: any trainable state; it is overwritten.
        state: the one that matters.
        names: of the modules.
        examples: the records.
        most: how many of them, from the first.
    """
    key = (model.fingerprint, fingerprint(state.items()), str(most), *names)
    known = _KEPT.get(examples)
    if known is not None and known[0] == key:
        return known[1]
    load_trainable_state(model, state)
    modules = [model.module.get_submodule(name) for name in names]
    some = examples.subset(range(min(most, len(examples))))
    rows = inputs_of(model, modules, some)
    _KEPT[examples] = key, rows
    return rows


@torch.no_grad()
def each_input(
    model: TaskModel, modules: Sequence[nn.Module], examples: Encoded
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yields what :func:`inputs_of` returns, one record after the other.

    With each comes its position in `examples`: they come in another order.
    """
    model.module.eval()
    units = examples.units(by_person=False)
    for part in physical_batches(examples, units, _BATCH):
        indices = [index for unit in part for index in unit]
        batch = model.task.collate(examples, indices).to(model.device)
        seen = _listen(model.module, modules, batch.inputs)
        mask = batch.inputs.get("attention_mask")
        for row, index in enumerate(indices):
            yield index, [_tokens(tokens, mask, row) for tokens in seen]


def _listen(
    network: nn.Module, modules: Sequence[nn.Module], inputs: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Returns what each module is given in one pass, which ends with the last."""
    seen: dict[int, torch.Tensor] = {}

    def note(module: nn.Module, args: Any) -> None:
        seen[id(module)] = args[0]
        if len(seen) == len(modules):
            raise _Enough

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        network(**inputs)
    except _Enough:
        return [seen[id(module)] for module in modules]
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(
        "Expected modules that a pass through the model calls, got others."
    )


def _tokens(tokens: torch.Tensor, mask: torch.Tensor | None, row: int) -> torch.Tensor:
    """Returns one record's rows, shape ``(tokens, width)``, on the CPU."""
    mine = tokens[row].cpu()
    if mine.dim() == 1:
        return mine.unsqueeze(0)
    if mask is None:
        return mine
    added = len(mine) - mask.shape[1]  # by a method, in front; padding is at the end
    return mine[: added + int(mask[row].sum())].clone()
