"""Who may come in: identity, allow list, name, version, in this order."""

from client import fleet_pb2 as pb
from client.tls import peer_of
from client.wire import Refused, check_protocol, quoted
from server.allowlist import AllowList
from server.link import Link
from server.slots import Slots


class Door:
    """Admits clients by their certificates; what they claim must agree, no more.

    Args:
        allow: who may come in.
        slots: which index each name has.
        insecure: believe the claimed names; on loopback.
    """

    def __init__(self, allow: AllowList, slots: Slots, *, insecure: bool) -> None:
        self._allow = allow
        self._slots = slots
        self._insecure = insecure

    def admit(self, link: Link, hello: pb.Hello) -> None:
        """Finds out who is there, and gives the link its name and index.

        Raises:
            Refused: if it is nobody who may come in.
        """
        claimed = quoted(hello.name)
        if self._insecure:
            link.name = claimed
        else:
            peer = peer_of(link.auth_context)
            if peer is None:
                raise Refused(
                    "unknown-client", "Expected one certificate, over TLS 1.3."
                )
            link.name, link.fingerprint = peer.name, peer.fingerprint
        self.check(link)
        if claimed != link.name:
            raise Refused(
                "name-mismatch",
                f"Expected the certificate's name, {link.name}, got '{claimed}'.",
            )
        check_protocol(hello.protocol)
        index = self._slots.index(link.name)
        if index is None:
            raise Refused("no-slot", "All clients of this run have their places.")
        link.client = index

    def check(self, link: Link) -> None:
        """Looks a client up again.

        Raises:
            Refused: if it is not, or no longer, on the list.
        """
        if not self._allow.admits(link.name, link.fingerprint):
            raise Refused(
                "unknown-client",
                f"Expected a client on the allow list, got {link.name} "
                f"{link.fingerprint or ''}".rstrip()
                + ".",
            )
