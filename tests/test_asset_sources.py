"""Tiny packages through the real npm and apt-get, from registries made here."""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal

import pytest

from fedpeft import assets
from fedpeft.assets import Asset
from fedpeft.assets.archives import unpack
from fedpeft.errors import AssetError

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")
needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def describe(archive: Path, source: Literal["debian", "npm"], folder: str) -> Asset:
    """Returns the catalogue entry of an archive that holds `folder`/data/a.txt."""
    return Asset(
        name="tiny",
        kind="data",
        source=source,
        package="tiny-asset",
        version="1.0.0",
        archive=archive.name,
        size_bytes=archive.stat().st_size,
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        licence="none",
        members=(f"{folder}/data/",),
        path=f"{folder}/data/a.txt",
    )


def pull(asset: Asset) -> Path:
    return assets.pull(asset.name, assets={asset.name: asset})


def fail(asset: Asset) -> str:
    """Pulls in vain and returns the message, which is one line."""
    with pytest.raises(AssetError) as caught:
        pull(asset)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_dpkg_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "tiny.deb"
    archive.write_bytes(b"")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssetError) as caught:
        unpack(describe(archive, "debian", "usr"), archive, tmp_path)
    assert str(caught.value) == (
        "Expected the program dpkg-deb to open tiny.deb, found none: install the "
        "package dpkg, then run `fedpeft assets pull tiny`."
    )


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serves a folder's files on this machine alone."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(_Quiet, directory=str(folder))
    )
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_tarball(path: Path) -> None:
    """Writes a package whose script would give itself away, and an unsafe link."""
    about = {
        "name": "tiny-asset",
        "version": "1.0.0",
        "scripts": {"prepack": "touch ran", "postinstall": "touch ran"},
    }
    files = {
        "package/package.json": json.dumps(about).encode(),
        "package/data/a.txt": b"alpha",
        "package/unused.txt": b"unused",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("package/data/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)


@pytest.fixture
def npm_asset(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Asset]:
    """An asset in a registry of npm that has one package."""
    folder = tmp_path / "registry"
    folder.mkdir()
    tarball = folder / "tiny-asset-1.0.0.tgz"
    write_tarball(tarball)
    integrity = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    with serve(folder) as address:
        version = {
            "name": "tiny-asset",
            "version": "1.0.0",
            "dist": {
                "tarball": f"{address}/{tarball.name}",
                "integrity": f"sha512-{integrity}",
            },
        }
        packument = {
            "name": "tiny-asset",
            "dist-tags": {"latest": "1.0.0"},
            "versions": {"1.0.0": version},
        }
        (folder / "tiny-asset").write_text(json.dumps(packument))
        monkeypatch.setenv("npm_config_registry", address)
        monkeypatch.setenv("npm_config_fetch_retries", "0")
        yield describe(tarball, "npm", "package")


@pytest.fixture
def debian_asset(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset in a Debian archive that has one package, read by apt-get update."""
    package, archive = tmp_path / "package", tmp_path / "archive"
    for folder in (package / "DEBIAN", package / "usr/share/tiny/data", archive):
        folder.mkdir(parents=True)
    (package / "usr/share/tiny/data/a.txt").write_text("alpha")
    (package / "usr/share/tiny/unused.txt").write_text("unused")
    control = "Package: tiny-asset\nVersion: 1.0.0\nArchitecture: all\n"
    control += "Maintainer: Ada <ada@example.org>\nDescription: tiny\n"
    (package / "DEBIAN/control").write_text(control)
    deb = archive / "tiny-asset_1.0.0_all.deb"
    run("dpkg-deb", "--root-owner-group", "--build", str(package), str(deb))
    asset = describe(deb, "debian", "usr/share/tiny")
    index = f"{control}Filename: ./{deb.name}\nSize: {asset.size_bytes}\n"
    (archive / "Packages").write_text(f"{index}SHA256: {asset.sha256}\n")
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{archive} ./\n")
    (tmp_path / "apt/lists").mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list";\n'
        'Dir::Etc::SourceParts "-";\n'
        f'Dir::State::Lists "{tmp_path}/apt/lists";\n'
        f'Dir::Cache "{tmp_path}/apt";\n'
        f'APT::Sandbox::User "";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    run("apt-get", "update", "--quiet=2")
    return asset


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@needs_npm
def test_npm_brings_the_members_and_runs_no_script(
    cache: Path, npm_asset: Asset
) -> None:
    assert pull(npm_asset).read_bytes() == b"alpha"
    found = [str(p.relative_to(cache)) for p in cache.rglob("*") if not p.is_dir()]
    assert sorted(found) == [
        "tiny-1.0.0/archive.sha256",
        "tiny-1.0.0/package/data/a.txt",
    ]


@needs_apt
def test_apt_brings_the_members_and_installs_nothing(
    cache: Path, debian_asset: Asset
) -> None:
    assert pull(debian_asset).read_bytes() == b"alpha"
    found = [str(p.relative_to(cache)) for p in cache.rglob("*") if not p.is_dir()]
    assert sorted(found) == [
        "tiny-1.0.0/archive.sha256",
        "tiny-1.0.0/usr/share/tiny/data/a.txt",
    ]
    assert not Path("/usr/share/tiny").exists()


def other_version(asset: Asset) -> Asset:
    return Asset(**{**vars(asset), "version": "2.0.0"})


@needs_npm
def test_npm_without_such_a_version_is_one_sentence(
    cache: Path, npm_asset: Asset
) -> None:
    assert fail(other_version(npm_asset)) == (
        "Expected npm to fetch tiny-asset@2.0.0, but no package index within its reach "
        "has it; check the connection and npm's settings, then run "
        "`fedpeft assets pull tiny`."
    )
    assert list(cache.iterdir()) == []


@needs_apt
def test_apt_without_such_a_version_says_to_update(
    cache: Path, debian_asset: Asset
) -> None:
    assert fail(other_version(debian_asset)) == (
        "Expected apt-get to fetch tiny-asset=2.0.0, but no package index within its "
        "reach has it; run `apt-get update`, then run `fedpeft assets pull tiny`."
    )
    assert list(cache.iterdir()) == []


@needs_npm
def test_refused_connection_of_npm_is_one_sentence(
    cache: Path, npm_asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    assert "check the connection and npm's settings" in fail(npm_asset)
    assert list(cache.iterdir()) == []


@needs_apt
def test_other_complaints_of_apt_are_quoted(
    tmp_path: Path, cache: Path, debian_asset: Asset
) -> None:
    (tmp_path / "archive" / debian_asset.archive).unlink()
    message = fail(debian_asset)
    assert message.startswith("Expected apt-get to fetch tiny-asset=1.0.0, but it fail")
    assert "File not found" in message
    assert list(cache.iterdir()) == []


@needs_npm
def test_other_complaints_of_npm_are_quoted(
    tmp_path: Path, cache: Path, npm_asset: Asset
) -> None:
    with (tmp_path / "registry" / npm_asset.archive).open("ab") as file:
        file.write(b"altered on the way")
    message = fail(npm_asset)
    assert message.startswith("Expected npm to fetch tiny-asset@1.0.0, but it failed: ")
    assert "sha512-" in message
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("source", "client"), [("npm", "npm"), ("debian", "apt-get")])
def test_machine_without_the_client_is_told_so(
    tmp_path: Path,
    cache: Path,
    source: Literal["npm", "debian"],
    client: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    archive = tmp_path / "tiny.tgz"
    write_tarball(archive)
    monkeypatch.setenv("PATH", os.devnull)
    message = fail(describe(archive, source, "package"))
    assert message.startswith(f"Expected {client} to fetch tiny-asset")
    assert "this machine has none; install it" in message
    assert list(cache.iterdir()) == []


@needs_npm
def test_links_are_no_members(npm_asset: Asset) -> None:
    link = {**vars(npm_asset), "members": ("package/data/link",)}
    assert "the archive has no such member" in fail(Asset(**link))
