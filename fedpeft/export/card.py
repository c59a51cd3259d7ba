"""The model card: what the model is, what protects whom, and how to use it.

Its text holds nothing of the data. Values from the configuration and the result are
escaped, so that none of them steers what reads the card.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedpeft.export.snippets import fits_the_plain_backbone, snippet
from fedpeft.export.stored import Trained
from fedpeft.wording import printable

_LONGEST = 200
_PATHS = ("public", "keys")
_LIBRARIES = {"peft": "peft", "merged": "transformers", "safetensors": "safetensors"}
_PIPELINES = {
    "text-classification": "text-classification",
    "image-classification": "image-classification",
    "causal-lm": "text-generation",
}
_MORE = {
    "example": "somebody with several records",
    "person": "somebody whose records lie at several clients",
    "client": "somebody who is several clients",
}
_WHAT = {
    "peft": "An adapter for the `peft` library, to be put on its backbone",
    "merged": "A whole model for `transformers`, with all that was trained folded in",
    "safetensors": "The trained tensors, to be put into their backbone",
}


def write_card(trained: Trained, format: str, folder: Path) -> None:
    """Writes ``README.md``."""
    (folder / "README.md").write_text(card(trained, format), encoding="utf-8")


def card(trained: Trained, format: str) -> str:
    """Returns the card: YAML front matter, then Markdown."""
    parts = [
        _front_matter(trained, format),
        _title(trained, format),
        "## Training\n\n" + _table(_training(trained)),
        "## Privacy\n\n" + _privacy(trained.run.result["privacy"]),
        "## Quality\n\n" + _quality(trained),
        "## Use\n\n" + _use(trained, format),
        "## Licence\n\nLeft to whoever publishes this. It is bound by the backbone's "
        "own licence.",
    ]
    return "\n\n".join(parts) + "\n"


def escaped(value: object) -> str:
    r"""Returns a value as one line that Markdown shows as it is.

    >>> escaped("a|b\n# <i>")
    'a\\|b \\# \\<i\\>'
    """
    line = printable(str(value), _LONGEST)
    return re.sub(r"([\\`*_{}\[\]<>#|~!$&])", r"\\\1", line)


def _front_matter(trained: Trained, format: str) -> str:
    config = trained.run.config
    tags = ["federated-learning", config.peft.name]
    if config.is_private:
        tags.insert(1, "differential-privacy")
    # A JSON text is a YAML text, whatever is quoted in it.
    lines = [
        "---",
        "# license: left to whoever publishes this",
        f"base_model: {json.dumps(trained.backbone)}",
        f"library_name: {_LIBRARIES[format]}",
        f"pipeline_tag: {_PIPELINES[config.model.task]}",
        f"tags: {json.dumps(tags)}",
        "---",
    ]
    return "\n".join(lines)


def _title(trained: Trained, format: str) -> str:
    clients = trained.run.config.partition.num_clients
    name = escaped(trained.backbone)
    text = (
        f"# {name}, fine-tuned by {clients} clients\n\n"
        f"{_WHAT[format]}. The clients trained it together: each kept its data and sent"
        " updates of the trained values alone; the others stayed as they were. Made "
        "with fedpeft."
    )
    if local := sorted(trained.run.local):
        text += (
            f"\n\n**{len(local)} of the trained tensors stay at their client** and "
            "have here the values from which every client began: "
            f"{', '.join(escaped(name) for name in local)}."
        )
    if trained.is_ported:
        text += (
            f"\n\n**ported from {trained.run.fingerprint} to "
            f"{trained.model.fingerprint}, not evaluated**: it was trained on another "
            "backbone than the one that it is for now."
        )
    return text


def _training(trained: Trained) -> Iterable[tuple[str, object]]:
    config, result = trained.run.config, trained.run.result
    options = ", ".join(
        f"{key} = {_public(value) if key in _PATHS else value}"
        for key, value in config.peft.options.items()
    )
    yield "method", f"{config.peft.name}" + (f" ({options})" if options else "")
    yield "task", config.model.task
    yield "backbone", trained.backbone
    yield "backbone fingerprint", trained.model.fingerprint
    yield "data", config.data.name or "files of the clients' own"
    yield "clients", config.partition.num_clients
    yield "clients a round", config.cohort.size
    yield "rounds", config.run.rounds
    yield "trained values", result.get("trainable_parameters")
    yield "frozen values", result["backbone_parameters"]
    yield "config hash", result["config_hash"]
    versions = result.get("versions", {}).items()
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions)


def _public(option: object) -> object:
    """Returns an option without where a file lies on this machine."""
    return Path(option).name if isinstance(option, str) else option


def _privacy(privacy: dict[str, Any]) -> str:
    if privacy["unit"] == "none":
        return (
            "**no privacy guarantee**: the clients' updates were neither clipped nor "
            "noised. The model may tell of single records that it was trained on."
        )
    unit: str = privacy["unit"]
    lines = [_table(_guarantee(privacy))]
    if privacy["noise"] == "seeded":
        lines.append(
            "**Warning: the noise was seeded.** Whoever knows the seed can remove it, "
            "and with it the guarantee. Such a run is a test or a reproduction."
        )
    lines.append(
        f"Neighbouring data differ by one {escaped(unit)}. Epsilon bounds what the "
        "model, and every update that was sent for it, can tell of that one. It is the "
        f"worst client's figure; {_MORE[unit]} has more than it. It says nothing of the"
        " backbone's own training data, nothing of the held-out data on which the model"
        " was judged, and nothing of choices that somebody made by looking at the data."
    )
    return "\n\n".join(lines)


def _guarantee(privacy: dict[str, Any]) -> Iterable[tuple[str, object]]:
    secure = "secure: from the operating system's keys"
    seeded = "seeded: removable"
    yield "unit", f"one {privacy['unit']}"
    yield "relation", privacy["relation"]
    yield "epsilon, planned", _upwards(privacy["planned_epsilon"])
    over = privacy.get("spent_over", "this run")
    yield f"epsilon, spent over {over}", _upwards(privacy["spent_epsilon"])
    yield "delta", f"{privacy['target_delta']:g}"
    yield "holds against", privacy["holds_against"]
    yield "noise", seeded if privacy["noise"] == "seeded" else secure
    yield "accountant", privacy["accountant"]


def _upwards(epsilon: float) -> str:
    """Returns an epsilon with four digits, rounded to the careful side.

    >>> _upwards(7.99991), _upwards(8.0)
    ('8.0000', '8.0000')
    """
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else "inf"


def _quality(trained: Trained) -> str:
    final, config = trained.run.result["final"], trained.run.config
    metrics = {**(final.get("others") or {}), final["metric"]: final["value"]}
    rows = [
        (name, "-" if value is None else f"{float(value):.4f}")
        for name, value in sorted(metrics.items())
    ]
    on = f"On the {config.run.evaluate_on} split, which the server holds"
    if trained.is_ported:
        on += ", before it was ported"
    return f"{on}.\n\n{_table(rows)}"


def _use(trained: Trained, format: str) -> str:
    code = f"```python\n{snippet(trained, format)}```"
    name = escaped(trained.run.config.peft.name)
    if format == "merged":
        return code
    backbone = (
        f"The backbone is not in this directory: {escaped(trained.backbone)}, whose "
        f"tensors have the fingerprint {trained.model.fingerprint}."
    )
    if format == "safetensors" and not fits_the_plain_backbone(trained):
        backbone += (
            f" The tensors belong to layers that the method {name} of fedpeft adds to "
            "it; each is named by its place."
        )
    return f"{backbone}\n\n{code}"


def _table(rows: Iterable[tuple[str, object]]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {escaped(name)} | {escaped(value)} |" for name, value in rows]
    return "\n".join(lines)
