"""The user's own images: a folder of one folder a label."""

import logging
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Literal

import torch

from fedpeft.data.examples import Examples
from fedpeft.data.images import ENDINGS, read_image
from fedpeft.errors import DataError

_logger = logging.getLogger(__name__)

_SHOWN = 3


def read(
    path: Path, labels: Sequence[str], unreadable: Literal["fatal", "skip"]
) -> Examples:
    """Reads the names of labelled images, ``path/LABEL/**/IMAGE``.

    **Guarantees**: every image named in the result was decoded once, whole. The order
    is by label as declared, then by name, whatever the file system.

    Hidden files are passed over. So are files whose names do not end like an image's,
    with a warning.

    Args:
        path: the folder of the labels' folders.
        labels: the labels that may occur, in the order of their numbers; one without a
            folder has no example. They may come from elsewhere than the folder, so each
            must be a plain name, which cannot lead out of it.
        unreadable: whether a file that cannot be decoded is an error, or is left out
            with a warning.

    Raises:
        DataError: for a label that is no plain name, a missing folder, one of an
            undeclared label, unreadable images if they are fatal, or no image at all.
    """
    _check_labels(path, labels)
    _check_folders(path, labels)
    files = [
        (file, number)
        for number, label in enumerate(labels)
        for file in _images(path / label)
    ]
    complaints = {
        file: reason for file, _ in files if (reason := _complaint(file)) is not None
    }
    if complaints:
        _report(path, list(complaints.values()), len(files), unreadable)
    kept = [(file, number) for file, number in files if file not in complaints]
    if not kept:
        raise DataError(
            f"{path}: expected at least one image in a label's folder, got none; the "
            f"names must end in {', '.join(ENDINGS)}."
        )
    return Examples(
        contents=tuple(file for file, _ in kept),
        labels=torch.tensor([number for _, number in kept]),
        groups=None,
        label_names=tuple(labels),
    )


def _check_labels(path: Path, labels: Sequence[str]) -> None:
    """Refuses a label that is hidden or is more than the name of a folder."""
    for label in labels:
        # Windows knows all separators, and drives; a dot also begins "..".
        is_plain = PureWindowsPath(label).name == label and "\0" not in label
        if not label or label.startswith(".") or not is_plain:
            raise DataError(
                f"{path}: expected labels that are plain names of folders in it, got "
                f"{label!r}; correct [data] labels."
            )


def _check_folders(path: Path, labels: Sequence[str]) -> None:
    if not path.is_dir():
        raise DataError(
            f"{path}: expected a folder with one folder a label, got "
            f"{'a file' if path.exists() else 'no such folder'}; correct [data] path."
        )
    for folder in sorted(path.iterdir()):
        if _is_shown(folder, path) and folder.is_dir() and folder.name not in labels:
            raise DataError(
                f"{folder}: expected a folder of a label among "
                f"{', '.join(map(repr, labels))}, got {folder.name!r}; move it away or "
                "declare it in [data] labels."
            )


def _images(folder: Path) -> list[Path]:
    """Returns the image files below a label's folder, sorted."""
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and _is_shown(file, folder)
    )
    others = [file for file in files if file.suffix.lower() not in ENDINGS]
    if others:
        _logger.warning(
            "%s: passed over %d files whose names do not end like an image's: %s",
            folder,
            len(others),
            _some([file.name for file in others]),
        )
    return [file for file in files if file.suffix.lower() in ENDINGS]


def _is_shown(path: Path, folder: Path) -> bool:
    """Whether neither it nor a folder above it, up to `folder`, is hidden."""
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _complaint(file: Path) -> str | None:
    """Says what is wrong with an image file, if anything is."""
    try:
        read_image(file)
    except DataError as error:
        return str(error).removesuffix("; replace or remove it.")
    return None


def _report(path: Path, complaints: list[str], num_files: int, unreadable: str) -> None:
    """Names and counts what cannot be read: an error, or one warning."""
    summary = f"{len(complaints)} of {num_files} images cannot be read: "
    summary += _some(complaints)
    if unreadable == "fatal":
        raise DataError(
            f"{path}: {summary}; replace or remove them, or set [data] unreadable = "
            '"skip".'
        )
    _logger.warning("%s: %s; they are left out", path, summary)


def _some(names: Sequence[str]) -> str:
    """Lists the first few.

    >>> _some(["a", "b"]), _some(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
