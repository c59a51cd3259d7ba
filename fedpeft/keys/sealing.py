"""Sealed records: written by many, readable by the owner of one key alone.

X25519 with a fresh key for each record, HKDF-SHA256, ChaCha20-Poly1305: the writer
cannot read what it has written, and a changed bit or a record under another name is
noticed. The construction of HPKE's base mode (RFC 9180) from its parts.

**Not guaranteed**: who wrote a record. Sealing takes the public key alone, so whoever
can write may replace a record wholly by one that opens as well.
"""

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpeft.errors import ConfigError, DataError
from fedpeft.keys.authority import checked_name, secret_pem
from fedpeft.keys.files import read_secret, write_files
from fedpeft.keys.pairs import parse_key

_MAGIC = b"FPSEAL1\n"
_ID_BYTES = 8
_KEY_BYTES = 32
_HEADER = len(_MAGIC) + _ID_BYTES + _KEY_BYTES
_TAG_BYTES = 16
# The key is used once, so that its only nonce may be a constant.
_NONCE = bytes(12)


def create_auditor(folder: Path, name: str) -> tuple[Path, str]:
    """Makes ``NAME.auditor.key``; returns its path and the public key in hexadecimal.

    Raises:
        ConfigError: on a bad name, or if it is there.
    """
    checked_name(name)
    key = x25519.X25519PrivateKey.generate()
    path = folder / f"{name}.auditor.key"
    write_files(folder, {path.name: secret_pem(key)})
    return path, public_of(key)


def read_auditor(path: Path) -> x25519.X25519PrivateKey:
    """Reads ``NAME.auditor.key``.

    Raises:
        ConfigError: if it is missing, readable by others, or another kind of key.
    """
    key = parse_key(read_secret(path), path)
    if not isinstance(key, x25519.X25519PrivateKey):
        raise ConfigError(
            f"Expected an auditor's key in {path}, got another kind: make one with "
            "`fedpeft keys auditor NAME`."
        )
    return key


def public_of(key: x25519.X25519PrivateKey) -> str:
    """Returns the public key, 64 hex digits, as ``[audit] auditor`` takes it."""
    return key.public_key().public_bytes_raw().hex()


def seal(data: bytes, auditor: str, name: str) -> bytes:
    """Encrypts for the owner of a public key.

    Args:
        data: what to hide; its length shows.
        auditor: the public key, 64 hex digits.
        name: of the record; it opens under this name alone.

    Raises:
        ConfigError: if nobody can own such a public key.
    """
    recipient = bytes.fromhex(auditor)
    own = x25519.X25519PrivateKey.generate()
    try:
        secret = own.exchange(x25519.X25519PublicKey.from_public_bytes(recipient))
    except ValueError:
        raise ConfigError(
            "[audit] auditor: expected a public key as `fedpeft keys auditor` prints "
            f"it, got {auditor}, which is none."
        ) from None
    public = own.public_key().public_bytes_raw()
    header = _MAGIC + _key_id(recipient) + public
    cipher = _cipher(secret, public + recipient)
    return header + cipher.encrypt(_NONCE, data, header + name.encode())


def unseal(sealed: bytes, key: x25519.X25519PrivateKey, name: str) -> bytes:
    """Decrypts what :func:`seal` made under the same name.

    Raises:
        DataError: if it is no sealed record, sealed for another key, cut short, altered
            or another record's.
    """
    if len(sealed) < _HEADER + _TAG_BYTES or not sealed.startswith(_MAGIC):
        raise DataError(
            f"Expected a sealed record as {name}, got {len(sealed)} bytes that are "
            "none: it was cut short, or is another file."
        )
    recipient = key.public_key().public_bytes_raw()
    header, body = sealed[:_HEADER], sealed[_HEADER:]
    wanted = header[len(_MAGIC) : -_KEY_BYTES]
    if wanted != _key_id(recipient):
        raise DataError(
            f"Expected the key {wanted.hex()} to open {name}, got "
            f"{_key_id(recipient).hex()}: take the auditor's key that the run names."
        )
    public = header[-_KEY_BYTES:]
    try:
        secret = key.exchange(x25519.X25519PublicKey.from_public_bytes(public))
        cipher = _cipher(secret, public + recipient)
        return cipher.decrypt(_NONCE, body, header + name.encode())
    except (InvalidTag, ValueError):  # the latter for a key that is no point
        raise DataError(
            f"The record {name} does not open: it was cut short, altered or renamed "
            "after it was written."
        ) from None


def _cipher(secret: bytes, context: bytes) -> ChaCha20Poly1305:
    derive = HKDF(hashes.SHA256(), _KEY_BYTES, salt=None, info=_MAGIC + context)
    return ChaCha20Poly1305(derive.derive(secret))


def _key_id(public: bytes) -> bytes:
    return hashlib.sha256(public).digest()[:_ID_BYTES]
