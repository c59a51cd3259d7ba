"""``fedpeft keys``: who is who."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedpeft.keys import Issued

app = typer.Typer(help="Keys and certificates.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Of a-z, 0-9 and -.")]
Folder = Annotated[Path, typer.Option(help="Where the files are written.")]
CaFolder = Annotated[
    Path | None, typer.Option(help="Where ca.crt and ca.key lie; default: --folder.")
]
Days = Annotated[int, typer.Option(min=1, max=3650, help="Of validity.")]
Renew = Annotated[
    bool, typer.Option("--renew", help="Replace a certificate; the old one is kept.")
]


@app.command("ca")
def ca(name: Name, folder: Folder = Path("keys")) -> None:
    """Make a federation's authority, which signs all other certificates."""
    from fedpeft import keys

    made = keys.create_ca(folder, name)
    _report(made, "give it to everybody")
    print(f"Wrote {made.path.with_suffix('.key')}: keep it offline, copy it safely.")


@app.command("server")
def server(
    hosts: Annotated[
        list[str], typer.Argument(help="Host names and IP addresses of the server.")
    ],
    folder: Folder = Path("keys"),
    ca_folder: CaFolder = None,
    days: Days = 397,
    renew: Renew = False,
) -> None:
    """Make the server's key and certificate."""
    from fedpeft import keys

    made = keys.create_server(
        folder, hosts, ca_folder=ca_folder, days=days, renew=renew
    )
    _report(made, f"for {', '.join(hosts)}")
    print(f"Wrote {made.path.with_suffix('.key')}: it stays at the server.")


@app.command("client")
def client(
    name: Name,
    folder: Folder = Path("keys"),
    ca_folder: CaFolder = None,
    days: Days = 397,
    renew: Renew = False,
    request: Annotated[
        bool, typer.Option("--request", help="Make a request for `keys sign` instead.")
    ] = False,
) -> None:
    """Make a client's key and certificate, and say what admits it."""
    from fedpeft import keys

    if request:
        path = keys.create_request(folder, name, renew=renew)
        print(
            f"Wrote {path}: send it to the authority's owner, for `fedpeft keys sign`."
        )
    else:
        made = keys.create_client(
            folder, name, ca_folder=ca_folder, days=days, renew=renew
        )
        _report(made, "for the client")
        _admit(made)
    if not (request and renew):
        print(f"Wrote {folder / f'{name}.key'}: it stays at the client.")


@app.command("sign")
def sign(
    request: Annotated[Path, typer.Argument(help="A client's NAME.csr.")],
    folder: Folder = Path("keys"),
    ca_folder: CaFolder = None,
    days: Days = 397,
    renew: Renew = False,
) -> None:
    """Make a client's certificate from its request; the key stays at the client."""
    from fedpeft import keys

    made = keys.sign_request(
        request, folder, ca_folder=ca_folder, days=days, renew=renew
    )
    _report(made, f"send it to {made.name}, with ca.crt")
    _admit(made)


@app.command("signing")
def signing(name: Name, folder: Folder = Path("keys")) -> None:
    """Make a key that signs reports, and the public key that checks them."""
    from fedpeft import keys

    path = keys.create_signing(folder, name)
    print(f"Wrote {path}: give it to everybody who checks a signature.")
    print(f"Wrote {path.with_suffix('.key')}: it stays here.")


@app.command("auditor")
def auditor(name: Name, folder: Folder = Path("keys")) -> None:
    """Make a key that opens what a run keeps for its auditor."""
    from fedpeft import keys

    path, public = keys.create_auditor(folder, name)
    print("A run keeps its answers for you with these lines under [audit]:")
    print(f'record = true\nauditor = "{public}"')
    print(f"Wrote {path}: it stays with you; without it nobody can read them.")


def _report(made: "Issued", advice: str) -> None:
    print(f"Wrote {made.path}, valid until {made.expires:%Y-%m-%d}: {advice}.")


def _admit(made: "Issued") -> None:
    print("The server admits it with this line under [clients] of its allow list:")
    print(made.allow_line())
    if made.replaced:
        print(
            "Put it there now; take the second fingerprint off once the client has "
            "reconnected."
        )
