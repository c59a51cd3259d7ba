"""The catalogue: what each asset is, and the archive it is pinned to."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from fedpeft.errors import AssetError


@dataclass(frozen=True)
class Asset:
    """One entry of the catalogue.

    Attributes:
        name: the name in the catalogue and in a scenario file.
        kind: what it is for.
        source: the kind of registry that has the package.
        package: its name there.
        version: the exact version.
        archive: the file name of the wheel, Debian package or tarball.
        size_bytes: the archive's size.
        sha256: the archive's hash, in hex.
        licence: of the package, and of what it holds where that differs.
        members: names in the archive to unpack; one that ends in "/" is a folder.
        path: what :func:`fedpeft.assets.locate` returns, as a name in the archive; with
            `convert`, the folder that the conversion makes.
        convert: how the first member becomes `path`, or None: it is used as it comes.
        needed_by: data sets of other names that are made of it.
    """

    name: str
    kind: Literal["model", "data"]
    source: Literal["pypi", "debian", "npm"]
    package: str
    version: str
    archive: str
    size_bytes: int
    sha256: str
    licence: str
    members: tuple[str, ...]
    path: str
    convert: Literal["dinov2-from-onnx", "llama-from-gguf"] | None = None
    needed_by: tuple[str, ...] = ()

    @property
    def pin(self) -> str:
        """What a finished folder was made from, and how."""
        return " ".join(filter(None, (self.sha256, self.convert)))

    @property
    def kept(self) -> tuple[str, ...]:
        """The names that lie in the finished folder."""
        return (self.path, *self.members[1:]) if self.convert else self.members


def catalogue() -> dict[str, Asset]:
    """Returns the shipped catalogue, by name.

    >>> [name for name, asset in catalogue().items() if asset.kind == "model"]
    ['minilm', 'vit-s', 'smollm2']
    """
    text = resources.files(__package__).joinpath("catalogue.toml").read_text("utf-8")
    return {name: _asset(name, **entry) for name, entry in tomllib.loads(text).items()}


def _asset(
    name: str, *, members: list[str], needed_by: Sequence[str] = (), **entry: Any
) -> Asset:
    return Asset(name, members=tuple(members), needed_by=tuple(needed_by), **entry)


def needed_by(name: str) -> list[str]:
    """Returns the assets that a backbone or data set is made of, none if unknown.

    >>> needed_by("minilm"), needed_by("emoji"), needed_by("bert")
    (['minilm'], ['emoji-google', 'emoji-twitter'], [])
    """
    return [
        asset.name
        for asset in catalogue().values()
        if name == asset.name or name in asset.needed_by
    ]


def find(name: str, assets: Mapping[str, Asset] | None) -> Asset:
    """Returns the asset of that name; `assets` None is the shipped catalogue.

    Raises:
        AssetError: if there is none.
    """
    assets = catalogue() if assets is None else assets
    if name not in assets:
        raise AssetError(
            f"Expected one of the assets {', '.join(assets)}, got {name!r}."
        )
    return assets[name]
