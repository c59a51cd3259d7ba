"""Checkpoints of earlier and of later versions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedpeft.errors import RunError
from server.checkpoint import FORMAT, _digest, load_checkpoint

OLD = Path(__file__).parent / "data" / "checkpoint-format-1.safetensors"


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    """The file was written by the version that knew no other."""
    shutil.copy(OLD, tmp_path / "round-000001.safetensors")
    progress = load_checkpoint(tmp_path, "0" * 64)
    assert torch.equal(progress.trainable["head.bias"], torch.tensor([1.0, 2.0]))
    assert progress.acknowledged == {0: (1, "h")}
    assert progress.records[0]["metric"] == 0.75
    assert progress.records[0]["codes"] is None


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_fallen_back_from(
    tmp_path: Path,
) -> None:
    shutil.copy(OLD, tmp_path / "round-000001.safetensors")
    tensors = {"trainable.head.bias": torch.zeros(2)}
    facts = json.dumps({"format": FORMAT + 1, "config_hash": "0" * 64})
    metadata = {"facts": facts, "digest": _digest(tensors, facts)}
    save_file(tensors, tmp_path / "round-000002.safetensors", metadata=metadata)
    with pytest.raises(RunError, match=f"newer fedpeft, in format {FORMAT + 1}"):
        load_checkpoint(tmp_path, "0" * 64)
