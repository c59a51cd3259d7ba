"""Issuing: files for the authority, the server and the clients.

One authority signs for a federation. Who holds a certificate of it and that
certificate's key is its server or one of its clients, never both. Elliptic keys (P-256)
speak TLS, since gRPC takes no Ed25519.

**Guarantees**: key files are readable by their owner alone from their first byte on;
no file is overwritten; a renewal keeps the old files beside the new ones; a certificate
does not outlive its authority. A client's key need not leave the client: it makes a
request, the authority's owner signs it.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedpeft.errors import ConfigError
from fedpeft.keys.authority import (
    Authority,
    certificate_builder,
    checked_host,
    checked_name,
    read_elliptic_key,
    secret_pem,
    subject_of,
)
from fedpeft.keys.files import read_file, write_files
from fedpeft.keys.pairs import common_name, fingerprint, now, parse_certificates

CA_DAYS = 3650
LEAF_DAYS = 397


@dataclass(frozen=True)
class Issued:
    """A certificate just written.

    Attributes:
        path: where; its key is beside it, if it was made here.
        name: its common name.
        fingerprint: as an allow list holds it.
        expires: when it ends, UTC.
        replaced: the fingerprint of the one whose place it took, if it took one.
    """

    path: Path
    name: str
    fingerprint: str
    expires: datetime.datetime
    replaced: str | None = None

    def allow_line(self) -> str:
        """Returns the client's line of the allow list; a replaced one stays on it."""
        prints = [one for one in (self.fingerprint, self.replaced) if one]
        return f"{self.name} = [" + ", ".join(f'"{one}"' for one in prints) + "]"


def create_ca(folder: Path, name: str, *, days: float = CA_DAYS) -> Issued:
    """Makes the authority: ``ca.crt`` for everybody, ``ca.key`` for its owner alone.

    Raises:
        ConfigError: on a bad name, or if there is one already.
    """
    # The ending keeps its subject apart from that of everyone it signs for.
    subject = subject_of(f"{checked_name(name)} CA")
    key = ec.generate_private_key(ec.SECP256R1())
    end = now() + datetime.timedelta(days=days)
    builder = certificate_builder(subject, subject, key.public_key(), end, is_ca=True)
    return _put(folder / "ca.crt", builder.sign(key, hashes.SHA256()), key)


def create_server(
    folder: Path,
    hosts: Sequence[str],
    *,
    ca_folder: Path | None = None,
    days: float = LEAF_DAYS,
    renew: bool = False,
) -> Issued:
    """Makes ``server.crt`` and ``server.key``.

    Args:
        folder: where to write.
        hosts: names and IP addresses by which clients reach the server.
        ca_folder: where the authority lies; `folder` by default.
        days: of validity; fewer if the authority ends before.
        renew: keep the pair that is there beside, and put the new one in its place.

    Raises:
        ConfigError: one line: what was expected, what came.
    """
    hosts = list(dict.fromkeys(checked_host(host) for host in hosts))
    authority = Authority.read(ca_folder or folder)
    key = ec.generate_private_key(ec.SECP256R1())
    name = hosts[0][:64]  # X.509 ends a common name there; clients look at all hosts
    certificate = authority.issue(
        "server", name, key.public_key(), days=days, hosts=hosts
    )
    return _put(folder / "server.crt", certificate, key, renew=renew)


def create_client(
    folder: Path,
    name: str,
    *,
    ca_folder: Path | None = None,
    days: float = LEAF_DAYS,
    renew: bool = False,
) -> Issued:
    """Makes ``NAME.crt`` and ``NAME.key``; arguments and errors as for the server."""
    checked_name(name, reserved=True)
    authority = Authority.read(ca_folder or folder)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue("client", name, key.public_key(), days=days)
    return _put(folder / f"{name}.crt", certificate, key, renew=renew)


def create_request(folder: Path, name: str, *, renew: bool = False) -> Path:
    """Makes ``NAME.key``, which stays here, and ``NAME.csr`` for the authority's owner.

    To renew is to ask for another certificate of the same key: whenever it comes, one
    move puts it in the old one's place, under a running client.

    Raises:
        ConfigError: on a bad name; if files are there, or none to renew.
    """
    checked_name(name, reserved=True)
    secret = folder / f"{name}.key"
    key = (
        read_elliptic_key(secret) if renew else ec.generate_private_key(ec.SECP256R1())
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject_of(name))
    request = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    files = {f"{name}.csr": request}
    if renew:  # a request says nothing that its key could not say again
        write_files(folder, files, replace=True)
    else:
        write_files(folder, {secret.name: secret_pem(key), **files})
    return folder / f"{name}.csr"


def sign_request(
    request: Path,
    folder: Path,
    *,
    ca_folder: Path | None = None,
    days: float = LEAF_DAYS,
    renew: bool = False,
) -> Issued:
    """Makes ``NAME.crt`` from a client's ``NAME.csr``; arguments as for the server.

    **Guarantees**: the request gives a name and a public key, nothing else: whatever
    it asks for besides is ignored. Its name must be its file's, so that who signs has
    said who it is.

    Raises:
        ConfigError: if it is no request, not signed by its own key, or of another name.
    """
    asked, key = _read_request(request)
    name = checked_name(request.stem, reserved=True)
    if common_name(asked.subject) != name:
        raise ConfigError(
            f"Expected {request} to be for {name}, got {common_name(asked.subject)!r}: "
            f"rename the file if that is who sent it."
        )
    authority = Authority.read(ca_folder or folder)
    certificate = authority.issue("client", name, key, days=days)
    return _put(folder / f"{name}.crt", certificate, None, renew=renew)


def _read_request(
    path: Path,
) -> tuple[x509.CertificateSigningRequest, ec.EllipticCurvePublicKey]:
    data = read_file(path)
    try:
        asked = x509.load_pem_x509_csr(data)
        key, is_own = asked.public_key(), asked.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise ConfigError(f"Expected a PEM request in {path}, got none.") from None
    if not is_own:
        raise ConfigError(f"Expected {path} to be signed by its own key, it is not.")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise ConfigError(f"Expected a P-256 key in {path}, got another kind.")
    return asked, key


def _put(
    path: Path,
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey | None,
    *,
    renew: bool = False,
) -> Issued:
    """Writes a certificate, and its key if it was made here."""
    files = {} if key is None else {f"{path.stem}.key": secret_pem(key)}
    files[path.name] = certificate.public_bytes(Encoding.PEM)
    replaced = _keep(path, list(files)) if renew else None
    write_files(path.parent, files, replace=renew)
    name, ends = common_name(certificate.subject), certificate.not_valid_after_utc
    return Issued(path, name, fingerprint(certificate), ends, replaced)


def _keep(path: Path, names: list[str]) -> str:
    """Copies a certificate's files; returns the certificate's fingerprint.

    A copy that is there already stems from a renewal that a crash ended between two
    files. It is the right one: the key now in place never had a certificate.
    """
    old = parse_certificates(read_file(path), path)[0]
    mark = fingerprint(old)
    ending = f".old-{old.not_valid_after_utc:%Y-%m-%d}-{mark[7:15]}"
    folder = path.parent
    copies = {name + ending: read_file(folder / name) for name in names}
    missing = {name: copies[name] for name in copies if not (folder / name).exists()}
    write_files(folder, missing)
    return mark
