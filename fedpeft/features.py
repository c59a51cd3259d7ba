"""What the frozen part of a model gives for an example: computed once, kept on disk.

Where everything that trains sits above some depth, what lies below never changes. It is
computed for each example alone, so that neither who else is in the batch nor whether it
was kept can change a bit of it.
"""

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from fedpeft.data import Encoded
from fedpeft.model import TaskModel
from fedpeft.sections import TrainingSection


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context of a forward pass in ``fp32`` or ``bf16``."""
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=precision == "bf16"
    )


class FeatureFile:
    """Tensors in one memory-mapped file of bounded size, shared by many examples.

    The file has no name, so that it is gone with the process: it holds what could tell
    of private records. When it or the disk is full, nothing more is kept.

    Args:
        limit_bytes: its largest size.
        folder: where it lies; None for the system's place for temporary files.
    """

    def __init__(self, limit_bytes: int, folder: Path | None = None) -> None:
        self._file, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)
        weakref.finalize(self, os.close, self._file)
        self._limit = limit_bytes
        self._end = 0
        self._map: mmap.mmap | None = None

    @property
    def size_bytes(self) -> int:
        """How much is kept."""
        return self._end

    def append(self, tensor: torch.Tensor) -> int | None:
        """Keeps a float32 tensor and returns where; None if there is no room."""
        data = tensor.contiguous().numpy().tobytes()
        if self._end + len(data) > self._limit:
            return None
        place = self._end
        try:
            # Never through the map: on a full disk that would end the process.
            is_whole = os.pwrite(self._file, data, place) == len(data)
        except OSError:
            is_whole = False
        if not is_whole:
            self._limit = self._end
            return None
        self._end += len(data)
        return place

    def read(self, place: int, shape: torch.Size) -> torch.Tensor:
        """Returns a copy of what was kept."""
        if self._map is None or place + 4 * shape.numel() > len(self._map):
            self._map = mmap.mmap(self._file, self._end, access=mmap.ACCESS_READ)
        values = np.frombuffer(self._map, np.float32, shape.numel(), place)
        return torch.from_numpy(values.copy()).view(shape)


class KeptFeatures:
    """The features of one set of examples.

    Args:
        model: whose frozen part computes them.
        examples: whose they are; held, so that they stay the same.
        precision: of the computation.
        file: where they are kept.
    """

    def __init__(
        self, model: TaskModel, examples: Encoded, precision: str, file: FeatureFile
    ) -> None:
        self._model, self._examples = model, examples
        self._precision, self._file = precision, file
        self._places: dict[int, tuple[int, torch.Size]] = {}

    def of(self, indices: list[int]) -> torch.Tensor:
        """Returns the features of the examples at `indices`, padded at the end."""
        features = [self._one(index) for index in indices]
        padded = pad_sequence(features, batch_first=True)
        return padded.to(self._model.device)

    def _one(self, index: int) -> torch.Tensor:
        if index in self._places:
            return self._file.read(*self._places[index])
        features = self._compute(index)
        place = self._file.append(features)
        if place is not None:
            self._places[index] = place, features.shape
        return features

    def _compute(self, index: int) -> torch.Tensor:
        batch = self._model.task.collate(self._examples, [index])
        module = self._model.module
        is_training = module.training
        module.eval()
        try:
            with autocast(self._model.device, self._precision):
                features = module.keep(batch.to(self._model.device).inputs)
        finally:
            module.train(is_training)
        assert features is not None
        return features[0].float().cpu()


def keep_features(
    model: TaskModel, examples: Encoded, precision: str, file: FeatureFile | None
) -> KeptFeatures | None:
    """Returns where a model's frozen features are kept; None if it has none to keep."""
    module = model.module
    has_some = module.keeps_features and module.head is not None
    if file is None or not (has_some or module.frozen_part):
        return None
    return KeptFeatures(model, examples, precision, file)


def feature_file(section: TrainingSection) -> FeatureFile | None:
    """Returns a file of the size that ``[training] cache_gib`` allows, if any.

    None too where the backbone's dropout is on: then nothing stays the same.
    """
    if section.cache_gib == 0 or section.dropout:
        return None
    return FeatureFile(int(section.cache_gib * (1 << 30)))
