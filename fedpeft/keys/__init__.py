"""Who is who: certificates, keys that sign documents, keys that open records."""

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
from fedpeft.keys.sealing import (
    create_auditor,
    public_of,
    read_auditor,
    seal,
    unseal,
)
from fedpeft.keys.signatures import create_signing, sign, verify

__all__ = [
    "LEAF_DAYS",
    "NAME",
    "Issued",
    "KeyPair",
    "certificate_fingerprint",
    "create_auditor",
    "create_ca",
    "create_client",
    "create_request",
    "create_server",
    "create_signing",
    "load_pair",
    "public_of",
    "read_auditor",
    "seal",
    "sign",
    "sign_request",
    "unseal",
    "verify",
]
