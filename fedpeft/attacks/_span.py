"""What updates tell of the first trained block's input: the space that it spans.

A trained matrix that reads tokens ``x_1 .. x_b`` has the gradient ``sum_i g_i x_i^T``:
whatever the ``g_i`` are, its rows lie in the span of the tokens. Where nothing below
trains, the tokens are the same in every round, so the rows of all rounds, and of all
matrices that read the same input, add up to one space. Neither the first round of
LoRA (B = 0) nor a small rank closes it.

Source: Petrov et al. (2024), DAGER, arXiv:2405.15586, section 4, for one update and a
matrix of full rank; that low-rank updates add up over rounds and matrices is ours.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpeft.interfaces import Operation
from fedpeft.tasks import TaskModule
from fedpeft.tensors import Tensors


@dataclass(frozen=True)
class Reader:
    """A trained matrix that reads the first trained block's input.

    Attributes:
        name: of the parameter, of shape ``(rows, width)``.
        module: whose ``forward`` is given the input.
    """

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Span:
    """The space that observed rows span, with how well each direction is known.

    Attributes:
        directions: orthonormal rows, shape ``(k, width)``, in doubles, strongest first.
        values: singular values in units of the noise of one entry, shape ``(k,)``.
    """

    directions: torch.Tensor
    values: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """Returns how far each direction is to be believed, 0 to 1, shape ``(k,)``.

        Noise of one unit an entry turns a direction of value s by an angle of about
        ``sqrt(width) / s``; this is the share of its square that is left.
        """
        signal = self.values**2
        return signal / (signal + self.directions.shape[1])

    def rank(self, least_weight: float = 0.5) -> int:
        """Returns how many directions stand out of the noise."""
        return int((self.weights > least_weight).sum())

    def residuals(self, candidates: torch.Tensor) -> torch.Tensor:
        """Returns how much of each candidate lies outside, 0 to 1.

        Args:
            candidates: inputs of one token, shape ``(..., width)``.

        Returns:
            Shape ``(...)``: the squared norm outside over the whole one.
        """
        unit = nn.functional.normalize(candidates.double(), dim=-1)
        inside = (unit @ self.directions.t()) ** 2 @ self.weights
        return (1 - inside).clamp(min=0)


def span_of(rows: torch.Tensor) -> Span:
    """Returns the space of rows whose entries carry noise of deviation 1.

    Args:
        rows: shape ``(n, width)``, see :func:`stacked_rows`.
    """
    _, values, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    return Span(directions, values)


def stacked_rows(
    updates: Sequence[Tensors], deviations: Sequence[Tensors], names: Sequence[str]
) -> torch.Tensor:
    """Returns all rows of the named matrices, each in units of its own noise.

    Rows without any signal, such as LoRA's of the first round, are left out.

    Args:
        updates: one a round.
        deviations: standard deviation of the noise on each entry of these.
        names: of the matrices that read the input.

    Returns:
        Shape ``(n, width)``, in doubles.
    """
    parts = []
    for update, deviation in zip(updates, deviations, strict=True):
        for name in names:
            rows, noise = update[name].double(), deviation[name].double()
            level = noise.square().mean(1, keepdim=True).sqrt()
            parts.append((rows / level)[rows.abs().sum(1) > 0])
    return torch.cat(parts)


def rounding(state: Tensors, update: Tensors) -> Tensors:
    """Returns the deviation of what single precision did to each entry of an update.

    A client adds its step to parameters of a certain size and keeps the nearest number:
    the error is uniform over one unit in the last place of the *parameter*, however
    small the step is.

    Args:
        state: what the client started from.
        update: what it answered.
    """
    deviations = {}
    for name, change in update.items():
        size = torch.maximum((state[name] + change).abs(), state[name].abs()).double()
        exponent = torch.floor(torch.log2(size.clamp(min=1e-30)))
        deviations[name] = 2.0 ** (exponent - 23) / 12**0.5
    return deviations


class _Reached(Exception):
    """Carries what was looked for out of a forward pass."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens


def find_readers(
    module: TaskModule,
    operations: Sequence[Operation],
    inputs: Mapping[str, torch.Tensor],
) -> list[Reader]:
    """Returns the trained matrices that read the first trained block's input.

    An input counts if it holds one vector a token and no trained parameter has had a
    part in it. Recognised by a trial pass: whatever asks for no gradient there is a
    public function of the example.

    Args:
        module: in any trainable state.
        operations: of all that trains.
        inputs: any example, as the backbone takes it.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    found: list[tuple[Reader, torch.Tensor]] = []

    def note(reader: nn.Module, name: str, tokens: torch.Tensor) -> None:
        if tokens.dim() == 3 and not tokens.requires_grad:
            found.append((Reader(name, reader), tokens))

    with torch.enable_grad(), _listening(operations, names, note):
        module(**inputs)
    if not found:
        return []
    first = found[0][1]
    return [
        reader
        for reader, tokens in found
        if tokens.shape == first.shape and torch.equal(tokens, first)
    ]


@torch.no_grad()
def first_input(
    module: TaskModule, reader: Reader, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Returns what a reader is given for these examples; nothing above is computed.

    Shape: ``(batch, tokens, width)``.
    """

    def leave(part: nn.Module, args: Any) -> None:
        raise _Reached(args[0])

    handle = reader.module.register_forward_pre_hook(leave)
    try:
        module(**inputs)
    except _Reached as reached:
        return reached.tokens
    finally:
        handle.remove()
    raise ValueError("Expected a reader that is part of the model, got another one.")


@contextmanager
def _listening(
    operations: Sequence[Operation], names: Mapping[int, str], note: Any
) -> Iterator[None]:
    """Calls `note` with every matrix that multiplies an input, and that input."""
    handles = []
    for operation in operations:
        for name in _matrices(operation, names):

            def hook(part: nn.Module, args: Any, name: str = name) -> None:
                note(part, name, args[0])

            handles.append(operation.module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _matrices(operation: Operation, names: Mapping[int, str]) -> list[str]:
    """Returns the operation's parameters that are multiplied by its module's input."""
    if operation.kind == "linear":
        return [names[id(p)] for p in operation.parameters.values() if p.dim() == 2]
    if operation.kind != "module":
        return []
    trained = [names[id(p)] for p in operation.parameters.values() if p.dim() == 2]
    return [name for name in trained if "lora_A" in name]
