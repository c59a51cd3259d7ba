"""Files that a configuration names by path and hash, the same at every client."""

import hashlib
import stat
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load

from fedpeft.tensors import Tensors

MAX_BYTES = 1 << 30
"""A larger file is refused unread: somebody else's plan may name any."""


def read_pinned(path: str | Path, sha256: str, what: str) -> Tensors:
    """Reads a safetensors file of tensors that were made of public data.

    Args:
        path: of the file.
        sha256: its hash, in hexadecimal digits.
        what: it holds, for messages.

    Raises:
        ValueError: if the file is missing or another, no regular file, or too large.
    """
    try:
        _check_file(path, what)
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"Expected the file of {what} {path}, got {error.strerror}: copy it there."
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256.lower():
        raise ValueError(
            f"Expected {path} with sha256 {sha256}, got {digest}: all clients need the "
            "same file."
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(
            f"Expected a safetensors file at {path}, got another: {error}."
        ) from None


def _check_file(path: str | Path, what: str) -> None:
    """Refuses what would never end, or would fill the memory."""
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"Expected the file of {what} {path}, got no regular file: copy it there."
        )
    if found.st_size > MAX_BYTES:
        raise ValueError(
            f"Expected the file of {what} {path} with at most {MAX_BYTES} bytes, got "
            f"{found.st_size}: correct the path, or take a smaller one."
        )
