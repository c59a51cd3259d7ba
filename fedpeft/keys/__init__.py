"""Who is who: certificates of server and clients, and keys that sign documents."""

from fedpeft.keys.issuing import (
    LEAF_DAYS,
    Issued,
    create_ca,
    create_client,
    create_request,
    create_server,
    sign_request,
)
from fedpeft.keys.pairs import NAME, KeyPair, certificate_fingerprint, load_pair
from fedpeft.keys.signatures import create_signing, sign, verify

__all__ = [
    "LEAF_DAYS",
    "NAME",
    "Issued",
    "KeyPair",
    "certificate_fingerprint",
    "create_ca",
    "create_client",
    "create_request",
    "create_server",
    "create_signing",
    "load_pair",
    "sign",
    "sign_request",
    "verify",
]
