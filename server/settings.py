"""The server's own file: where it listens, with which keys, for whom."""

from pathlib import Path

from pydantic import Field, model_validator

from client.settings import LOOPBACK, TransportSection, host_of
from fedpeft.sections import Section


class ServerSection(TransportSection):
    """``[server]``: where, for whom, and how patient.

    Attributes:
        scenario: what is trained, and how: a file, or the name of a shipped one.
        output: the run directory; a run that stands there goes on.
        address: ``host:port`` to listen at; port 0 takes a free one.
        allow: the file of names and fingerprints of the clients, reread on change.
        held_out: a file of the server's own public data, in the scenario's columns, on
            which every model is judged; None takes the scenario's test split.
        deadline_seconds: that a round waits for answers.
        heartbeat_seconds: between two signs of life of a client; three missed ones end
            its connection. A name taken off the allow list is out at the next.
        status_port: of the page on loopback; 0 takes a free one, None has no page.
        status_host: where the page is offered; elsewhere than on loopback anybody who
            reaches it can read it.
    """

    scenario: str
    output: Path
    address: str = "127.0.0.1:9443"
    allow: Path
    held_out: Path | None = None
    deadline_seconds: float = Field(default=3600.0, gt=0)
    heartbeat_seconds: float = Field(default=10.0, gt=0)
    status_port: int | None = Field(default=8080, ge=0, le=65535)
    status_host: str = "127.0.0.1"

    @model_validator(mode="after")
    def _insecure_stays_here(self) -> "ServerSection":
        if self.insecure and host_of(self.address) not in LOOPBACK:
            raise ValueError(
                f"expected an address on loopback beside insecure = true, got "
                f"{self.address}"
            )
        return self


class ServerSettings(Section):
    """The whole file of ``fedpeft server``."""

    server: ServerSection
