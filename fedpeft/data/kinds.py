"""Which keys of ``[data]`` mean something for which kind of source."""

from pathlib import Path
from typing import Literal, TypeAlias

from fedpeft.data.rows import READERS
from fedpeft.errors import ConfigError
from fedpeft.sections import DataSection

Kind: TypeAlias = Literal[
    "a data set by name",
    "a folder of images",
    "a file of labelled texts",
    "a file of prompts and completions",
]

_TEXTS: tuple[Kind, ...] = ("a file of labelled texts",)
_PAIRS: tuple[Kind, ...] = ("a file of prompts and completions",)

# Not here: what is asked of the task (max_length, image_size), and what each has.
_KINDS_OF: dict[str, tuple[Kind, ...]] = {
    "text": _TEXTS,
    "label": _TEXTS,
    "multi_label": _TEXTS,
    "label_separator": _TEXTS,
    "prompt": _PAIRS,
    "completion": _PAIRS,
    "group": _TEXTS + _PAIRS,
    "person": ("a data set by name", *_TEXTS, *_PAIRS),
    "unreadable": ("a folder of images",),
}


def kind_of(section: DataSection) -> Kind:
    """Tells what ``[data]`` points at; what does not exist counts as a file."""
    if section.path is None:
        return "a data set by name"
    path = Path(section.path).expanduser()
    # Some programs write a table as a folder, train.parquet: it is none of images.
    if path.is_dir() and path.suffix.lower() not in READERS:
        return "a folder of images"
    if section.completion is None:
        return "a file of labelled texts"
    return "a file of prompts and completions"


def check_keys(section: DataSection, kind: Kind) -> None:
    """Refuses a key that would be passed over in silence.

    Raises:
        ConfigError: names the first such key, and what it describes.
    """
    for key, kinds in _KINDS_OF.items():
        is_set = getattr(section, key) != DataSection.model_fields[key].default
        if is_set and kind not in kinds:
            raise ConfigError(
                f"[data] {key}: describes {' or '.join(kinds)}, got {kind}, "
                f"{section.name or section.path}; remove the key."
            )
