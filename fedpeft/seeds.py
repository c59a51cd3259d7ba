"""Seeds that depend on what they are for, so that no two uses share a stream."""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Returns a 63-bit seed that is a hash of `seed` and of what it is for.

    >>> derive_seed(0, "batches", 3) != derive_seed(0, "batches", 4)
    True
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Returns a CPU generator seeded by :func:`derive_seed`."""
    rng = torch.Generator()
    rng.manual_seed(derive_seed(seed, *purpose))
    return rng
