"""Keys and certificates: made, renewed, read, and used in real handshakes."""

import datetime
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedpeft import keys
from fedpeft.errors import ConfigError

HOSTS = ["fl.example.org", "localhost", "127.0.0.1", "::1"]
A_MINUTE_AGO = -1 / 1440
"""Days of validity: a certificate begins five minutes before it is made."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "ours"
    keys.create_ca(folder, "study")
    keys.create_server(folder, HOSTS)
    keys.create_client(folder, "hospital-a")
    return folder


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A folder with an authority and one client."""
    keys.create_ca(tmp_path, "study")
    keys.create_client(tmp_path, "hospital-a")
    return tmp_path


def _openssl(*arguments: str | Path) -> str:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _pair(folder: Path, name: str, ca: Path | None = None, **options) -> keys.KeyPair:
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    return keys.load_pair(certificate, key, ca or folder / "ca.crt", **options)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fedpeft.cli import main; main()", "keys"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def _output(*arguments: str | Path) -> str:
    done = _command(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _error(*arguments: str | Path) -> str:
    """Runs a command that must fail; returns its one line."""
    done = _command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def _context(purpose: int, folder: Path, name: str, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    return context


def _shake(
    server: tuple[Path, str],
    client: tuple[Path, str],
    *,
    server_ca: Path | None = None,
    client_ca: Path | None = None,
    host: str = "localhost",
) -> str:
    """Shakes hands in memory; returns the client's name as the server sees it.

    Args:
        server: folder and name of its pair.
        client: folder and name of its pair.
        server_ca: whom the server trusts; the authority in its folder by default.
        client_ca: whom the client trusts; the authority in its folder by default.
        host: as the client knows the server.
    """
    pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusted = server_ca or server[0] / "ca.crt", client_ca or client[0] / "ca.crt"
    ends = (
        _context(ssl.PROTOCOL_TLS_SERVER, *server, trusted[0]).wrap_bio(
            pipes[0], pipes[1], server_side=True
        ),
        _context(ssl.PROTOCOL_TLS_CLIENT, *client, trusted[1]).wrap_bio(
            pipes[1], pipes[0], server_hostname=host
        ),
    )
    for _ in range(4):
        for end in reversed(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate = ends[0].getpeercert()
    assert certificate is not None
    return dict(pair for (pair,) in certificate["subject"])["commonName"]


def test_openssl_verifies_each_certificate_for_its_role_alone(folder: Path) -> None:
    ca = folder / "ca.crt"
    for name, purpose, other in (
        ("server", "sslserver", "sslclient"),
        ("hospital-a", "sslclient", "sslserver"),
    ):
        path = folder / f"{name}.crt"
        verify = ["verify", "-x509_strict", "-CAfile", ca]
        assert "OK" in _openssl(*verify, "-purpose", purpose, path)
        refused = subprocess.run(
            ["openssl", *verify, "-purpose", other, path], capture_output=True
        )
        assert refused.returncode != 0
    text = _openssl("x509", "-in", folder / "server.crt", "-noout", "-text")
    for words in (
        "CN = study CA",
        "CN = fl.example.org",
        "Basic Constraints: critical\n                CA:FALSE",
        "Key Usage: critical\n                Digital Signature\n",
        "Extended Key Usage: \n                TLS Web Server Authentication\n",
        "DNS:fl.example.org, DNS:localhost, IP Address:127.0.0.1",
        "Subject Key Identifier",
        "Authority Key Identifier",
        "prime256v1",
    ):
        assert words in text
    text = _openssl("x509", "-in", ca, "-noout", "-text")
    assert "CA:TRUE, pathlen:0" in text
    assert "Key Usage: critical\n                Certificate Sign, CRL Sign" in text


def test_both_sides_of_one_authority_shake_hands(folder: Path) -> None:
    for host in HOSTS:
        name = _shake((folder, "server"), (folder, "hospital-a"), host=host)
        assert name == "hospital-a"


def test_a_foreign_authority_of_the_same_name_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    keys.create_ca(tmp_path, "study")
    keys.create_client(tmp_path, "hospital-a")
    keys.create_server(tmp_path, HOSTS)
    ours = folder / "ca.crt"
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake((folder, "server"), (tmp_path, "hospital-a"), client_ca=ours)
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake((tmp_path, "server"), (folder, "hospital-a"), server_ca=ours)
    with pytest.raises(
        ConfigError, match=r"take the ca.crt of the authority that made"
    ):
        _pair(tmp_path, "hospital-a", ours)


def test_a_client_cannot_be_a_server_nor_a_server_a_client(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        _shake((folder, "hospital-a"), (folder, "hospital-a"), host="hospital-a")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        _shake((folder, "server"), (folder, "server"))
    assert _pair(folder, "server", role="server").name == "fl.example.org"
    with pytest.raises(ConfigError, match="make it with `fedpeft keys client`"):
        _pair(folder, "server", role="client")


def test_an_unlisted_host_is_refused(folder: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        _shake((folder, "server"), (folder, "hospital-a"), host="example.org")


def test_an_expired_certificate_is_refused_with_its_date(new: Path) -> None:
    keys.create_server(new, ["localhost"])
    keys.create_client(new, "late", days=A_MINUTE_AGO)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        _shake((new, "server"), (new, "late"))
    with pytest.raises(ConfigError, match=r"expired on \d{4}-.*keys client .*--renew"):
        _pair(new, "late")
    early = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    with pytest.raises(ConfigError, match=r"not yet valid.*check this machine's clock"):
        _pair(new, "hospital-a", at=early)


def test_a_certificate_ends_with_its_authority(tmp_path: Path) -> None:
    authority = keys.create_ca(tmp_path, "study", days=100)
    made = keys.create_client(tmp_path, "hospital-a")
    assert made.expires == authority.expires
    assert not _pair(tmp_path, "hospital-a").expires_soon
    keys.create_client(tmp_path, "hospital-b", days=29)
    assert _pair(tmp_path, "hospital-b").expires_soon
    old = tmp_path / "old"
    keys.create_ca(old, "study", days=A_MINUTE_AGO)
    with pytest.raises(ConfigError, match=r"ca.crt expired on .* make a new authority"):
        keys.create_client(old, "hospital-a")


def test_two_authorities_in_one_file_are_both_trusted(
    folder: Path, tmp_path: Path
) -> None:
    next_ca = keys.create_ca(tmp_path, "study").path
    both = tmp_path / "both.crt"
    both.write_bytes(next_ca.read_bytes() + (folder / "ca.crt").read_bytes())
    keys.create_client(tmp_path, "hospital-a")
    for place in (folder, tmp_path):
        assert _pair(place, "hospital-a", both).ca == both.read_bytes()
        server = (folder, "server")
        assert _shake(server, (place, "hospital-a"), server_ca=both, client_ca=both)


def test_keys_are_their_owners_alone(new: Path) -> None:
    keys.create_signing(new, "study")
    keys.create_client(new, "hospital-a", renew=True)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in new.iterdir()}
    assert {mode for path, mode in modes.items() if ".key" in path.name} == {0o600}
    assert {mode for path, mode in modes.items() if ".key" not in path.name} == {0o644}
    assert "PRIVATE" not in repr(_pair(new, "hospital-a"))
    (new / "hospital-a.key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"got mode 0640 .* `chmod 600 .*a.key`"):
        _pair(new, "hospital-a")


def test_nothing_is_overwritten(new: Path) -> None:
    keys.create_server(new, ["localhost"])
    keys.create_signing(new, "study")
    keys.create_request(new, "hospital-b")
    keys.sign_request(new / "hospital-b.csr", new)
    before = _files(new)
    for again in (
        lambda: keys.create_ca(new, "other"),
        lambda: keys.create_server(new, ["example.org"]),
        lambda: keys.create_client(new, "hospital-a"),
        lambda: keys.create_signing(new, "study"),
        lambda: keys.create_request(new, "hospital-b"),
        lambda: keys.sign_request(new / "hospital-b.csr", new),
    ):
        with pytest.raises(ConfigError, match="found one and left it alone"):
            again()
    (new / "hospital-c.crt").write_text("half of a pair is a pair too")
    with pytest.raises(ConfigError, match=r"hospital-c.crt yet, found one"):
        keys.create_client(new, "hospital-c")
    (new / "hospital-c.crt").unlink()
    assert _files(new) == before


def test_a_renewal_keeps_the_old_pair_and_names_both_fingerprints(new: Path) -> None:
    before = _files(new)
    first = keys.certificate_fingerprint(before["hospital-a.crt"])
    made = keys.create_client(new, "hospital-a", renew=True)
    assert made.allow_line() == f'hospital-a = ["{made.fingerprint}", "{first}"]'
    after = _files(new)
    assert after["hospital-a.key"] != before["hospital-a.key"]
    assert _pair(new, "hospital-a").certificate == after["hospital-a.crt"]
    kept = {name: data for name, data in after.items() if ".old-" in name}
    assert sorted(kept.values()) == sorted(
        (before["hospital-a.crt"], before["hospital-a.key"])
    )
    old = {Path(name).suffixes[0]: new / name for name in kept}
    assert keys.load_pair(old[".crt"], old[".key"], new / "ca.crt").name == "hospital-a"
    keys.create_client(new, "hospital-a", renew=True)  # on the same day
    assert len([name for name in _files(new) if ".old-" in name]) == 4
    with pytest.raises(
        ConfigError, match=r"Cannot read .*hospital-b.crt: No such file"
    ):
        keys.create_client(new, "hospital-b", renew=True)


def test_a_renewal_that_a_crash_cut_in_two_is_made_again(new: Path) -> None:
    before = _files(new)
    keys.create_client(new, "hospital-a", renew=True)
    (new / "hospital-a.crt").write_bytes(before["hospital-a.crt"])  # the key came first
    with pytest.raises(ConfigError, match=r"it is another's.*--renew"):
        _pair(new, "hospital-a")
    keys.create_client(new, "hospital-a", renew=True)
    assert _pair(new, "hospital-a").name == "hospital-a"
    kept = [data for name, data in _files(new).items() if ".key.old-" in name]
    assert kept == [before["hospital-a.key"]]


def test_a_reader_never_sees_a_wrong_pair_while_another_renews(new: Path) -> None:
    done = threading.Event()

    def renew() -> None:
        for _ in range(20):
            keys.create_client(new, "hospital-a", renew=True)
            time.sleep(0.01)
        done.set()

    writer = threading.Thread(target=renew)
    writer.start()
    seen = set()
    while not done.is_set():
        pair = _pair(new, "hospital-a")
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = serialization.load_pem_private_key(pair.key, None)
        assert key.public_key() == certificate.public_key()
        seen.add(pair.certificate)
    writer.join()
    assert len(seen) > 1


def test_a_key_need_not_leave_its_client(folder: Path, tmp_path: Path) -> None:
    request = keys.create_request(tmp_path, "hospital-b")
    assert sorted(_files(tmp_path)) == ["hospital-b.csr", "hospital-b.key"]
    central = tmp_path / "central"
    made = keys.sign_request(request, central, ca_folder=folder)
    assert sorted(_files(central)) == ["hospital-b.crt"]
    made.path.rename(tmp_path / "hospital-b.crt")
    ca = folder / "ca.crt"
    assert _pair(tmp_path, "hospital-b", ca, role="client").name == "hospital-b"
    assert _shake((folder, "server"), (tmp_path, "hospital-b"), client_ca=ca)
    key = (tmp_path / "hospital-b.key").read_bytes()
    keys.create_request(tmp_path, "hospital-b", renew=True)
    (tmp_path / "hospital-b.crt").rename(made.path)
    again = keys.sign_request(request, central, ca_folder=folder, renew=True)
    assert again.replaced == made.fingerprint
    assert len(_files(central)) == 2
    again.path.rename(tmp_path / "hospital-b.crt")
    assert _pair(tmp_path, "hospital-b", ca).key == key


def _request(path: Path, name: str, key, *extensions: x509.ExtensionType) -> Path:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    request = builder.sign(key, hashes.SHA256())
    path.write_bytes(request.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_request_gets_nothing_that_it_asks_for(folder: Path, tmp_path: Path) -> None:
    request = _request(
        tmp_path / "hospital-b.csr",
        "hospital-b",
        ec.generate_private_key(ec.SECP256R1()),
        x509.BasicConstraints(ca=True, path_length=None),
        x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName([x509.DNSName("fl.example.org")]),
    )
    made = keys.sign_request(request, tmp_path, ca_folder=folder)
    text = _openssl("x509", "-in", made.path, "-noout", "-text")
    assert "CA:FALSE" in text
    assert "TLS Web Client Authentication\n" in text
    for words in ("CA:TRUE", "Server Authentication", "Alternative", "example.org"):
        assert words not in text


def test_a_request_of_another_name_key_or_hand_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    p256 = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "hospital-b.csr"
    bad_name = _request(path, "hospital-a", p256)
    with pytest.raises(ConfigError, match="to be for hospital-b, got 'hospital-a'"):
        keys.sign_request(bad_name, tmp_path, ca_folder=folder)
    for key in (
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
    ):
        _request(path, "hospital-b", key)
        with pytest.raises(ConfigError, match="Expected a P-256 key"):
            keys.sign_request(path, tmp_path, ca_folder=folder)
    good = _request(path, "hospital-b", p256)
    der = bytearray(
        x509.load_pem_x509_csr(good.read_bytes()).public_bytes(
            serialization.Encoding.DER
        )
    )
    der[der.index(b"hospital-b") + 9] = ord("c")
    forged = tmp_path / "hospital-c.csr"
    request = x509.load_der_x509_csr(bytes(der))
    forged.write_bytes(request.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(ConfigError, match="signed by its own key"):
        keys.sign_request(forged, tmp_path, ca_folder=folder)
    path.write_bytes((folder / "ca.crt").read_bytes())
    with pytest.raises(ConfigError, match="Expected a PEM request"):
        keys.sign_request(path, tmp_path, ca_folder=folder)
    assert not list(tmp_path.glob("*.crt"))


def test_files_that_are_no_keys_are_named(new: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Cannot read .*hospital-b.key: No such file"
    ):
        _pair(new, "hospital-b")
    with pytest.raises(ConfigError, match=r"PEM certificate in .*ca.key, got none"):
        _pair(new, "hospital-a", new / "ca.key")
    (new / "hospital-a.key").write_bytes((new / "hospital-a.crt").read_bytes())
    with pytest.raises(ConfigError, match=r"private key without a password in .*a.key"):
        _pair(new, "hospital-a")
    with pytest.raises(ConfigError, match="make it with `fedpeft keys ca NAME`"):
        keys.create_client(new / "nowhere", "hospital-a")


def test_a_signature_holds_for_its_bytes_and_key_alone(tmp_path: Path) -> None:
    public = keys.create_signing(tmp_path, "study").read_bytes()
    secret = (tmp_path / "study.signing.key").read_bytes()
    signature = keys.sign(b"report", secret)
    assert len(signature) == 64
    assert keys.verify(b"report", signature, public)
    assert not keys.verify(b"Report", signature, public)
    assert not keys.verify(b"report", signature[:-1], public)
    other = keys.create_signing(tmp_path, "other").read_bytes()
    assert not keys.verify(b"report", signature, other)
    keys.create_ca(tmp_path, "study")
    with pytest.raises(ConfigError, match="`fedpeft keys signing`"):
        keys.sign(b"report", (tmp_path / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"take NAME\.signing\.pub"):
        keys.verify(b"report", signature, secret)


def test_a_fingerprint_is_the_one_of_openssl(folder: Path) -> None:
    path = folder / "hospital-a.crt"
    printed = _openssl("x509", "-in", path, "-noout", "-fingerprint", "-sha256")
    expected = printed.strip().partition("=")[2].replace(":", "").lower()
    assert keys.certificate_fingerprint(path.read_bytes()) == f"sha256:{expected}"
    with pytest.raises(ConfigError, match="Expected a PEM certificate"):
        keys.certificate_fingerprint(b"")


@pytest.mark.parametrize("name", ["", "Hospital", "a b", "-a", "a" * 64, "../a", "a\n"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    for make in (keys.create_ca, keys.create_client, keys.create_request):
        with pytest.raises(ConfigError, match="Expected a name of a-z, 0-9 and -"):
            make(tmp_path, name)
    assert not _files(tmp_path)


@pytest.mark.parametrize(
    "host", ["", "a b", "a:9443", "[::1]", "*.org", "127.0.0.300", "a..b", "a" * 64]
)
def test_bad_hosts_are_refused(folder: Path, tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="leave port and brackets out"):
        keys.create_server(tmp_path, [host], ca_folder=folder)


def test_a_long_host_is_no_common_name_but_a_host(folder: Path, tmp_path: Path) -> None:
    host = f"{'a' * 60}.{'b' * 60}.example.org"
    keys.create_server(tmp_path, [host], ca_folder=folder)
    ca = folder / "ca.crt"
    server = (tmp_path, "server")
    assert _shake(server, (folder, "hospital-a"), server_ca=ca, host=host)


def test_the_commands_say_what_to_do_next(tmp_path: Path) -> None:
    folder = ("--folder", tmp_path)
    assert "keep it offline" in _output("ca", "study", *folder)
    assert "server.crt" in _output("server", "localhost", "127.0.0.1", *folder)
    shown = _output("client", "hospital-a", *folder, "--days", "90")
    line = next(line for line in shown.splitlines() if line.startswith("hospital-a = "))
    mark = keys.certificate_fingerprint((tmp_path / "hospital-a.crt").read_bytes())
    assert line == f'hospital-a = ["{mark}"]'
    shown = _output("client", "hospital-a", *folder, "--renew")
    assert f', "{mark}"]' in shown
    assert "once the client has reconnected" in shown
    there = ("--folder", tmp_path / "there")
    assert "hospital-b.csr: send it" in _output(
        "client", "hospital-b", "--request", *there
    )
    request = tmp_path / "there" / "hospital-b.csr"
    assert "hospital-b = [" in _output("sign", request, *folder)
    assert "study.signing.pub" in _output("signing", "study", *folder)


def test_a_bad_command_is_one_line(tmp_path: Path) -> None:
    folder = ("--folder", tmp_path)
    assert "at most 63, got 'My CA'" in _error("ca", "My CA", *folder)
    assert "fedpeft keys ca NAME" in _error("server", "localhost", *folder)
    keys.create_ca(tmp_path, "study")
    assert "left it alone" in _error("ca", "study", *folder)
    assert "leave port and brackets out" in _error("server", "a:9443", *folder)
    assert "got 'server': choose another" in _error("client", "server", *folder)
    assert "--days" in _error("client", "hospital-a", "--days", "0", *folder)
    assert "No such file" in _error("sign", tmp_path / "hospital-a.csr", *folder)
    assert "got '.'" in _error("signing", ".", *folder)
    assert sorted(_files(tmp_path)) == ["ca.crt", "ca.key"]
