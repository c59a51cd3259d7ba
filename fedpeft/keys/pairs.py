"""Pairs of certificate and key, as a server or client uses them.

The certificate says who it is, the key proves it, the authority vouches for it.
"""

import datetime
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.errors import ConfigError
from fedpeft.keys.files import read_file, read_secret

Role = Literal["server", "client"]

USAGES: dict[Role, x509.ObjectIdentifier] = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}
NAME = re.compile("[a-z0-9][a-z0-9-]{0,62}")
"""Of a client: what its certificate and the allow list call it."""

EXPIRES_SOON = datetime.timedelta(days=30)
RETRY_SECONDS = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its key, checked, as gRPC takes them.

    Attributes:
        certificate: PEM, as the other side gets it.
        key: PEM, secret.
        ca: PEM of the authority that the other side's certificate must come from.
        name: the certificate's common name.
        expires: when the certificate ends, UTC.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    ca: bytes
    name: str
    expires: datetime.datetime

    @property
    def expires_soon(self) -> bool:
        """Whether fewer than 30 days are left."""
        return self.expires - now() < EXPIRES_SOON


def load_pair(
    certificate: Path,
    key: Path,
    ca: Path,
    *,
    role: Role | None = None,
    at: datetime.datetime | None = None,
) -> KeyPair:
    """Reads what one side needs for TLS; what would fail later fails here, in words.

    Args:
        certificate: this side's, PEM, signed by `ca` itself.
        key: its private key, PEM.
        ca: the authority's certificate; several in a row while one replaces another.
        role: what the certificate must be for; None does not look.
        at: the time at which it must be valid, UTC; now by default.

    Raises:
        ConfigError: if a file cannot be read, the key is readable by others, key and
            certificate do not belong together, the certificate is not signed by `ca`,
            not of this role, not valid yet or no longer.
    """
    certificate_pem, key_pem = _read_matching(certificate, key)
    own = parse_certificates(certificate_pem, certificate)[0]
    ca_pem = read_file(ca)
    issuers = parse_certificates(ca_pem, ca)
    issuer = next((one for one in issuers if _has_signed(one, own)), None)
    if issuer is None:
        raise ConfigError(
            f"Expected {certificate} signed by {ca}, it is not: take the ca.crt of the "
            f"authority that made it."
        )
    if role is not None and role not in _roles(own):
        raise ConfigError(
            f"Expected a {role}'s certificate in {certificate}, got another's: make it "
            f"with `fedpeft keys {role}`."
        )
    for one, path in ((issuer, ca), (own, certificate)):
        check_dates(one, path, at or now())
    expires = min(own.not_valid_after_utc, issuer.not_valid_after_utc)
    return KeyPair(certificate_pem, key_pem, ca_pem, common_name(own.subject), expires)


def certificate_fingerprint(pem: bytes) -> str:
    """Returns ``sha256:`` and the hash of a PEM certificate's DER, in hexadecimal.

    Raises:
        ConfigError: if it is no certificate.
    """
    return fingerprint(parse_certificates(pem, "the certificate")[0])


def fingerprint(certificate: x509.Certificate) -> str:
    """As :func:`certificate_fingerprint`, of a certificate already parsed."""
    return f"sha256:{certificate.fingerprint(hashes.SHA256()).hex()}"


def check_dates(
    certificate: x509.Certificate, path: Path, at: datetime.datetime
) -> None:
    """Refuses a certificate outside its dates, with the date and what to do."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if at < start:
        raise ConfigError(
            f"{path} is not yet valid: it starts on {start:%Y-%m-%d %H:%M} UTC, and it "
            f"is {at:%Y-%m-%d %H:%M}; check this machine's clock."
        )
    if at > end:
        is_ca = certificate.subject == certificate.issuer
        remedy = (
            "make a new authority with `fedpeft keys ca NAME --folder DIR`"
            if is_ca
            else f"renew it with `fedpeft keys {_roles(certificate)[0]} ... --renew`"
        )
        raise ConfigError(f"{path} expired on {end:%Y-%m-%d %H:%M} UTC: {remedy}.")


def common_name(subject: x509.Name) -> str:
    """Returns the common name of a subject, empty if it has none or several."""
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def parse_certificates(pem: bytes, where: Path | str) -> list[x509.Certificate]:
    """Returns at least one certificate."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion):
        raise ConfigError(f"Expected a PEM certificate in {where}, got none.") from None


def parse_key(pem: bytes, where: Path | str) -> PrivateKeyTypes:
    """Returns a private key of any kind."""
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(
            f"Expected a PEM private key without a password in {where}, got none."
        ) from None


def now() -> datetime.datetime:
    """Returns the time, UTC."""
    return datetime.datetime.now(datetime.UTC)


def _read_matching(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Reads a pair; again for a moment, since a renewal replaces file by file."""
    for pause in (*RETRY_SECONDS, None):
        key_pem, pem = read_secret(key), read_file(certificate)
        own = parse_certificates(pem, certificate)[0]
        if own.public_key() == parse_key(key_pem, key).public_key():
            break
        if pause is None:
            raise ConfigError(
                f"Expected {key} to be the key of {certificate}, it is another's: put "
                f"two of one making in place, or use `fedpeft keys ... --renew`."
            )
        time.sleep(pause)
    return pem, key_pem


def _has_signed(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _roles(certificate: x509.Certificate) -> list[Role]:
    """Returns what a certificate is for; one that does not say is for everything."""
    try:
        extension = certificate.extensions.get_extension_for_class(
            x509.ExtendedKeyUsage
        )
    except x509.ExtensionNotFound:
        return list(USAGES)
    return [role for role, usage in USAGES.items() if usage in extension.value]
