"""Signed reports: ``report.sig`` vouches for both files of a report at once.

Its first line names the format, then one line a file: its sha256 and its name. Exactly
these lines are signed (Ed25519); the last line is the signature in base64. `sha256sum`
can read the lines between.
"""

import base64
import binascii
import hashlib
from pathlib import Path

from fedpeft.errors import ConfigError, FedpeftError
from fedpeft.keys import sign, verify

FORMAT = "fedpeft-report/1"
FILES = ("report.html", "report.json")
SIGNATURE = "report.sig"


def sign_report(folder: Path, key_pem: bytes) -> bytes:
    """Returns what ``report.sig`` holds for the files in a folder.

    **Guarantees**: the signature covers every byte of both files and nothing else. It
    says who vouches for them, not when, and not that what they say is true.

    Args:
        folder: of the report.
        key_pem: an Ed25519 private key.

    Raises:
        ConfigError: if the key is no signing key.
    """
    statement = _statement(folder)
    return statement + base64.b64encode(sign(statement, key_pem)) + b"\n"


def verify_report(path: Path, public_pem: bytes) -> Path:
    """Checks a report's signature; returns the report's folder.

    Args:
        path: any of its three files, or their folder.
        public_pem: the key of whoever is believed to have signed.

    Raises:
        FedpeftError: in one line, which file is not the one that was signed.
    """
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in (*FILES, SIGNATURE):
        raise ConfigError(
            f"Expected {', '.join((*FILES, SIGNATURE))} or their folder, got {path}."
        )
    signed, signature = _read(folder / SIGNATURE)
    if not verify(signed, signature, public_pem):
        raise FedpeftError(
            f"Not verified: {folder / SIGNATURE} was not made with this key, or was "
            "altered."
        )
    rows, actual = signed.split(b"\n")[1:], _statement(folder).split(b"\n")[1:]
    altered = [
        name
        for name, row, found in zip(FILES, rows, actual, strict=False)
        if row != found
    ]
    if altered or rows != actual:
        raise FedpeftError(
            f"Not verified: {' and '.join(altered) or 'the report'} in {folder} is not "
            "what was signed."
        )
    return folder


def _statement(folder: Path) -> bytes:
    hashes = [hashlib.sha256(_bytes(folder / name)).hexdigest() for name in FILES]
    rows = [f"{digest}  {name}" for digest, name in zip(hashes, FILES, strict=True)]
    return "\n".join([FORMAT, *rows, ""]).encode()


def _read(path: Path) -> tuple[bytes, bytes]:
    """Returns what was signed, and the signature."""
    data = _bytes(path)
    statement, _, last = data.removesuffix(b"\n").rpartition(b"\n")
    try:
        signature = base64.b64decode(last, validate=True)
    except binascii.Error:
        signature = b""
    # Base64 has several spellings of the same bytes; only one of them was written.
    whole = statement + b"\n" + base64.b64encode(signature) + b"\n"
    if not statement.startswith(FORMAT.encode()) or not signature or data != whole:
        raise FedpeftError(f"Not verified: {path} is no whole signature of a report.")
    return statement + b"\n", signature


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error.strerror}; a signed report is three files in "
            "one folder."
        ) from None
