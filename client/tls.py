"""Mutual TLS 1.3, from the files that either side's settings name.

That it is 1.3 alone is set in ``client/__init__.py``, before gRPC is imported.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from client.settings import TransportSection
from fedpeft.errors import FedpeftError
from fedpeft.keys import KeyPair, certificate_fingerprint, load_pair

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """Who the other side has proved to be.

    Attributes:
        name: its certificate's common name.
        fingerprint: ``sha256:...`` of its certificate.
    """

    name: str
    fingerprint: str


def peer_of(auth_context: Mapping[str, Sequence[bytes]]) -> Peer | None:
    """Reads who a connection comes from; None unless by TLS 1.3 with one certificate.

    Args:
        auth_context: as gRPC gives it after the handshake.
    """
    names = auth_context.get("x509_common_name", ())
    certificates = auth_context.get("x509_pem_cert", ())
    version = auth_context.get("ssl_tls_version", (b"TLSv1.3",))
    if len(names) != 1 or len(certificates) != 1 or list(version) != [b"TLSv1.3"]:
        return None
    name = names[0].decode("ascii", errors="replace")
    return Peer(name, certificate_fingerprint(certificates[0]))


def client_credentials(section: TransportSection) -> grpc.ChannelCredentials:
    """Reads the files as they are now, for one connection.

    Raises:
        ConfigError: if they cannot be used.
    """
    pair = load_pair(*_files(section), role="client")
    _warn_of_the_end(pair)
    return grpc.ssl_channel_credentials(pair.ca, pair.key, pair.certificate)


def server_credentials(section: TransportSection) -> grpc.ServerCredentials:
    """Reads the files, and again at the first connection after they were replaced.

    A renewal that went wrong is one line in the log; the keys before it go on.

    Raises:
        ConfigError: if they cannot be used at the start.
    """
    files = _files(section)
    seen = _signature(files)
    first = _configuration(load_pair(*files, role="server"))

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        now = _signature(files)
        if now == seen:
            return None
        seen = now
        try:
            configuration = _configuration(load_pair(*files, role="server"))
        except FedpeftError as error:
            logger.warning("keys=unchanged error=%s", error)
            return None
        logger.info("keys=renewed")
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        first, renewed, require_client_authentication=True
    )


def _configuration(pair: KeyPair) -> grpc.ServerCertificateConfiguration:
    _warn_of_the_end(pair)
    keys = [(pair.key, pair.certificate)]
    return grpc.ssl_server_certificate_configuration(keys, pair.ca)


def _warn_of_the_end(pair: KeyPair) -> None:
    if pair.expires_soon:
        end = pair.expires.date()
        logger.warning("certificate=%s ends=%s: renew it", pair.name, end)


def _files(section: TransportSection) -> tuple[Path, Path, Path]:
    certificate, key, ca = section.certificate, section.key, section.ca
    if certificate is None or key is None or ca is None:
        raise ValueError("Expected settings with keys, got insecure ones.")
    return certificate, key, ca


def _signature(files: tuple[Path, ...]) -> list[tuple[int, int, int] | None]:
    """Returns what changes when a file is replaced or written."""
    return [_look(path) for path in files]


def _look(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
