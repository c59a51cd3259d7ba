"""A report's files, in an order that never leaves a signature of other bytes."""

import hashlib
from pathlib import Path

from fedpeft.audit.document import to_document, to_text
from fedpeft.audit.gates import Verdict
from fedpeft.audit.page.render import render
from fedpeft.audit.results import Audit
from fedpeft.audit.signing import SIGNATURE, sign_report
from fedpeft.durable import write_atomically


def write_report(
    audit: Audit, verdict: Verdict, folder: Path, key_pem: bytes | None = None
) -> None:
    """Writes ``report.json`` and ``report.html``, and ``report.sig`` with a key.

    An older report there is replaced; its signature goes first, so that none ever lies
    beside files that it was not made for.

    Args:
        audit: what was found.
        verdict: the policy held against it.
        folder: made if it is not there.
        key_pem: an Ed25519 private key; None leaves the report unsigned, which it says.

    Raises:
        ConfigError: if the key is no signing key.
    """
    document = to_text(to_document(audit, verdict)).encode()
    digest = hashlib.sha256(document).hexdigest()
    signed = key_pem is not None
    page = render(audit, verdict, document_hash=digest, signed=signed).encode()
    (folder / SIGNATURE).unlink(missing_ok=True)
    write_atomically(folder / "report.json", document)
    write_atomically(folder / "report.html", page)
    if key_pem is not None:
        write_atomically(folder / SIGNATURE, sign_report(folder, key_pem))
