"""The contracts. Who has read this page has understood the architecture.

A run is a pipeline of four families. Each knows these contracts and nothing of the
other families:

* a :class:`PeftMethod` adds a few trainable parameters to a frozen backbone and names
  the :class:`Operation` in which each of them takes part;
* a :class:`PrivacyEngine` turns these operations' per-sample gradients into one
  clipped, noised gradient a step;
* a :class:`Compressor` turns an update into a :class:`Payload` and back;
* an :class:`Aggregator` turns a stream of updates into one step of the server.

Variants are frozen dataclasses of hyperparameters: their fields are their section of
the configuration file. State goes in and comes out; randomness is an argument. To
change a variant, wrap it.
"""

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import nn

from fedpeft.errors import InvalidPayload
from fedpeft.tensors import Tensors

OperationKind = Literal[
    "linear",
    "scale_shift",
    "bias",
    "norm",
    "tokens",
    "embedding",
    "pool",
    "counts",
    "weight",
    "module",
    "other",
]
"""Which per-sample rule applies; ``other`` is for the engine ``opacus`` alone."""

NoiseFn: TypeAlias = Callable[[torch.Tensor, float], torch.Tensor]
"""``noise(total, standard_deviation)`` -> the noised total, same shape."""

State: TypeAlias = Tensors
"""What an aggregator carries from round to round; named tensors, so it checkpoints."""


@dataclass(frozen=True)
class Operation:
    """One place where trainable parameters act: what a method tells the privacy engine.

    Attributes:
        module: the module whose ``forward`` uses the parameters.
        kind: which per-sample rule applies (one file each in ``privacy/operations``).
        parameters: the module's trainable parameters, by the role the kind gives them.
    """

    module: nn.Module
    kind: OperationKind
    parameters: dict[str, nn.Parameter]


class PeftMethod(ABC):
    """Adds trainable parameters to a frozen backbone.

    Attributes:
        is_identity_at_start: False where a method cannot leave the backbone's output
            unchanged: attention to an added token takes from the others.
    """

    is_identity_at_start: ClassVar[bool] = True

    @property
    def starts_from_weights(self) -> bool:
        """Whether what trains starts from the backbone's own values, or replaces them.

        Then it belongs to this backbone alone; else it can be put on another one of the
        same shapes.
        """
        return False

    @abstractmethod
    def attach(self, backbone: nn.Module) -> list[Operation]:
        """Freezes the backbone, adds the trainable parts in place and names them.

        **Guarantees**: the backbone's output is unchanged if `is_identity_at_start`;
        exactly the parameters of the returned operations require a gradient; random
        initial values come from torch's global generator, which the caller seeds.
        """

    def merge(self, backbone: nn.Module) -> None:
        """Folds what was trained into the backbone's own layers, in place.

        **Guarantees**: afterwards the modules and their names are those of the plain
        backbone, and its outputs are the same up to rounding.

        Raises:
            ValueError: if the method computes what no plain layer can.
        """
        raise ValueError(
            f"Expected a method that merges into the backbone's own weights, got "
            f"{type(self).__name__}, which adds layers of its own: export its tensors."
        )

    def to_peft(self, backbone: nn.Module) -> "PeftAdapter":
        """Returns what was trained, as the `peft` library stores it.

        Raises:
            ValueError: if that library has no such method.
        """
        raise ValueError(
            f"Expected a method that the peft library knows, got {type(self).__name__}:"
            " export it merged, or its tensors."
        )


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as the `peft` library loads it.

    Attributes:
        config: the content of ``adapter_config.json``.
        tensors: by name within the backbone, such as
            ``encoder.layer.0.attention.self.query.lora_A.weight``.
    """

    config: dict[str, object]
    tensors: Tensors


class FrozenPart(ABC):
    """The part of a model whose result depends on the example alone.

    What it computes never changes while the model trains, so that it can be kept. A
    method whose backbone is not a plain stack of layers any more (a side network, a
    pool chosen by a feature) adds a module that is one of these.
    """

    @abstractmethod
    def compute(
        self, backbone: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Returns what may be kept.

        Shapes: ``(batch, tokens, ...)``, which is padded where inputs are, or
        ``(batch, features)``. Nothing in it depends on trainable parameters.
        """

    @abstractmethod
    def resume(
        self,
        backbone: nn.Module,
        inputs: dict[str, torch.Tensor],
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the last hidden state, ``(batch, tokens, features)``, from `kept`."""


class HeadMaker(ABC):
    """A module of a method that makes the task's head, where a linear one will not do.

    It is looked for in the backbone, as a :class:`FrozenPart` is.
    """

    @abstractmethod
    def make_head(self, num_features: int, num_labels: int) -> nn.Module:
        """Returns a map of ``(batch, features)`` to logits ``(batch, labels)``.

        All that trains in it is in layers of ``nn.Linear``.
        """


class PrivacyEngine(ABC):
    """Losses of examples -> one gradient a step in ``.grad``, for one model."""

    @abstractmethod
    def bind(self, model: nn.Module, operations: list[Operation]) -> None:
        """Prepares the model.

        Raises:
            ValueError: if a trainable parameter is covered by no operation, or by two.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forgets what an interrupted step left; local training starts with it."""

    @abstractmethod
    def accumulate(
        self, losses: torch.Tensor, owners: torch.Tensor | None = None
    ) -> None:
        """Adds the clipped gradients of one physical batch to the step's sum.

        Args:
            losses: one loss an example, shape ``(batch,)``, attached to its graph.
            owners: whose example each is, shape ``(batch,)``, int64, counted from 0
                within the batch: one owner's gradients are summed before they are
                clipped, and all of an owner's examples must be in this batch. None: one
                owner each.
        """

    @abstractmethod
    def step(self, noise: NoiseFn) -> None:
        """Adds noise to the sum, divides by the batch size and sets ``.grad``.

        Under privacy the nominal size, which is public; else the examples' number.

        A step without a single accumulated batch is a valid step: noise alone.
        """


@dataclass(frozen=True)
class Payload:
    """A compressed update as it travels.

    Attributes:
        codec: the compressor's name.
        version: the version of the codec's format.
        header: what the decoder needs beside the template: counts, scales.
        body: the coded symbols.
    """

    codec: str
    version: int
    header: bytes
    body: bytes

    def to_bytes(self) -> bytes:
        """Serialises: magic, version, lengths, header, body and a CRC-32 of it all."""
        codec = self.codec.encode()
        lengths = struct.pack(
            "<BBHI", self.version, len(codec), len(self.header), len(self.body)
        )
        content = b"FP" + lengths + codec + self.header + self.body
        return content + struct.pack("<I", zlib.crc32(content))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Payload":
        """Reads what :meth:`to_bytes` wrote.

        Raises:
            InvalidPayload: for anything else. Nothing is allocated beyond `data`.
        """
        if len(data) < 14 or data[:2] != b"FP":
            raise InvalidPayload(f"Expected a payload, got {len(data)} other bytes.")
        content, checksum = data[:-4], struct.unpack("<I", data[-4:])[0]
        if zlib.crc32(content) != checksum:
            raise InvalidPayload("The payload's checksum is wrong: bytes were altered.")
        version, codec_size, header_size, body_size = struct.unpack(
            "<BBHI", content[2:10]
        )
        codec_end = 10 + codec_size
        header_end = codec_end + header_size
        if header_end + body_size != len(content):
            raise InvalidPayload("The payload's parts do not add up to its length.")
        codec = content[10:codec_end].decode("ascii", errors="replace")
        return cls(codec, version, content[codec_end:header_end], content[header_end:])


class Compressor(ABC):
    """Turns an update into a payload and back."""

    @abstractmethod
    def compress(self, update: Tensors, rng: torch.Generator) -> Payload:
        """Compresses finite tensors.

        Raises:
            ValueError: if a value is not finite.
        """

    @abstractmethod
    def decompress(self, payload: Payload, like: Tensors) -> Tensors:
        """Restores tensors with the names, shapes and dtypes of `like`.

        **Guarantees**: memory is bounded by a small multiple of `like` and the payload;
        the result is finite.

        Raises:
            InvalidPayload: for anything that ``compress`` of such tensors cannot give.
        """

    @abstractmethod
    def entropy_bits(self, payload: Payload, like: Tensors) -> float:
        """Returns the information content of the payload's symbols, in bits.

        The bound that a lossless coder of the same symbols could reach.
        """


@dataclass(frozen=True)
class Update:
    """One client's answer, decoded.

    Attributes:
        tensors: local minus global trainable state, to be added.
        num_examples: the client's number of examples; None wherever privacy is claimed,
            since the number is private.
    """

    tensors: Tensors
    num_examples: int | None = None


class Aggregator(ABC):
    """Turns the updates of a round into the tensors to add to the server's state."""

    @abstractmethod
    def init(self, like: Tensors) -> State:
        """Returns the state before the first round."""

    @abstractmethod
    def aggregate(
        self, updates: Iterable[Update], state: State
    ) -> tuple[Tensors, State]:
        """Consumes the stream once and returns the step tensors and the next state.

        Raises:
            ValueError: if the stream is empty.
        """
