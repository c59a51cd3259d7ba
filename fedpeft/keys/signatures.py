"""Signatures: who vouches for a document.

Ed25519: short keys, and no randomness that a signature could go wrong with.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedpeft.errors import ConfigError
from fedpeft.keys.authority import checked_name, secret_pem
from fedpeft.keys.files import write_files
from fedpeft.keys.pairs import parse_key


def create_signing(folder: Path, name: str) -> Path:
    """Makes ``NAME.signing.key`` and ``NAME.signing.pub``; returns the latter's path.

    Raises:
        ConfigError: on a bad name, or if they are there.
    """
    checked_name(name)
    key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path = folder / f"{name}.signing.pub"
    write_files(folder, {f"{name}.signing.key": secret_pem(key), path.name: pem})
    return path


def sign(data: bytes, key_pem: bytes) -> bytes:
    """Returns the Ed25519 signature of `data`, 64 bytes.

    Raises:
        ConfigError: if the key is no signing key.
    """
    key = parse_key(key_pem, "the signing key")
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(
            "Expected an Ed25519 key: make it with `fedpeft keys signing`."
        )
    return key.sign(data)


def verify(data: bytes, signature: bytes, public_pem: bytes) -> bool:
    """Whether the owner of a public key signed exactly these bytes.

    Raises:
        ConfigError: if the key is no public signing key.
    """
    try:
        key = serialization.load_pem_public_key(public_pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ConfigError("Expected an Ed25519 public key: take NAME.signing.pub.")
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True
