"""The authority: what stands in a certificate, and who signs it."""

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from fedpeft.errors import ConfigError
from fedpeft.keys.files import read_file, read_secret
from fedpeft.keys.pairs import (
    NAME,
    USAGES,
    Role,
    load_pair,
    now,
    parse_certificates,
    parse_key,
)

CLOCK_SKEW = datetime.timedelta(minutes=5)

_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}([.]{_LABEL})*")


@dataclass(frozen=True)
class Authority:
    """Who may sign: a certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> "Authority":
        """Reads ``ca.crt`` and ``ca.key``.

        Raises:
            ConfigError: if they are not there, no pair, or have expired.
        """
        path, secret = folder / "ca.crt", folder / "ca.key"
        if not path.exists():
            raise ConfigError(
                f"Expected an authority at {path}, found none: make it with `fedpeft "
                f"keys ca NAME`, or name its folder with --ca-folder."
            )
        load_pair(path, secret, path)  # it signed itself
        certificate = parse_certificates(read_file(path), path)[0]
        return cls(certificate, read_elliptic_key(secret))

    def issue(
        self,
        role: Role,
        name: str,
        public_key: ec.EllipticCurvePublicKey,
        *,
        days: float,
        hosts: Sequence[str] = (),
    ) -> x509.Certificate:
        """Returns a certificate for one role alone, which ends with its authority."""
        end = now() + datetime.timedelta(days=days)
        end = min(end, self.certificate.not_valid_after_utc)
        usage = x509.ExtendedKeyUsage([USAGES[role]])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(
            self.key.public_key()
        )
        builder = (
            certificate_builder(
                subject_of(name), self.certificate.subject, public_key, end
            )
            .add_extension(usage, critical=False)
            .add_extension(issuer, critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())


def certificate_builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    end: datetime.datetime,
    *,
    is_ca: bool = False,
) -> x509.CertificateBuilder:
    """What all certificates have in common."""
    constraints = x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None)
    usage = x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(public_key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(constraints, critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
    )


def checked_name(name: str, *, reserved: bool = False) -> str:
    """Returns a name that can be a file's and a client's."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"Expected a name of a-z, 0-9 and -, at most 63, got {name!r}: choose one."
        )
    if reserved and name in ("ca", "server"):
        raise ConfigError(f"Expected a client's name, got {name!r}: choose another.")
    return name


def checked_host(host: str) -> str:
    """Returns a host name in lower case, or an IP address in its usual form.

    >>> checked_host("FL.example.org"), checked_host("0:0::1")
    ('fl.example.org', '::1')
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        name = host.lower()
    if not _HOST.fullmatch(name) or name.rpartition(".")[2].isdigit():
        raise ConfigError(
            f"Expected a host name or an IP address, got {host!r}: leave port and "
            f"brackets out."
        )
    return name


def subject_of(name: str) -> x509.Name:
    """Returns a subject of a common name alone."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def read_elliptic_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads a key for TLS."""
    key = parse_key(read_secret(path), path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"Expected an elliptic key in {path}, got another kind.")
    return key


def secret_pem(
    key: ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | x25519.X25519PrivateKey,
) -> bytes:
    """Returns what a key file holds: PKCS8, PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
