"""Keys of a pool from public examples."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from scipy.cluster.vq import kmeans2

from fedpeft.peft._pinned import read_pinned


@dataclass(frozen=True)
class Keys:
    """What queries are compared with.

    Attributes:
        keys: shape ``(entries, features)``.
        centre: taken from every query before, shape ``(features,)``: what all queries
            have in common would else decide.
    """

    keys: torch.Tensor
    centre: torch.Tensor


def fit_keys(queries: torch.Tensor, pool_size: int, seed: int = 0) -> Keys:
    """Returns the centres of the queries' clusters by k-means.

    The queries are those of the pool itself (``PoolQuery.compute``), of length one
    after their mean is taken away.

    **Guarantees**: none of privacy: a cluster may be a single example. The examples
    must be public, never a client's.

    Shapes: queries ``(examples, features)``.

    >>> ends = torch.tensor([[2.0, 1.0], [3.0, 1.0], [-2.0, 1.0], [-3.0, 1.0]])
    >>> fit_keys(ends, 2).keys.abs()
    tensor([[1., 0.],
            [1., 0.]])
    """
    centre = queries.mean(0)
    directions = torch.nn.functional.normalize(queries - centre, dim=1)
    points = directions.double().cpu().numpy()
    means, _ = kmeans2(points, pool_size, iter=100, minit="++", seed=seed)
    return Keys(torch.from_numpy(means).float(), centre.float().cpu())


def write_keys(keys: Keys, path: str | Path) -> str:
    """Writes a file for ``[peft] keys`` and returns its sha256."""
    content = save({"keys": keys.keys.contiguous(), "centre": keys.centre.contiguous()})
    Path(path).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def read_keys(path: str | Path, sha256: str, pool_size: int, features: int) -> Keys:
    """Reads what :func:`write_keys` wrote.

    Raises:
        ValueError: if the file is missing or another, or its tensors do not fit.
    """
    found = read_pinned(path, sha256, "keys")
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != {"keys": (pool_size, features), "centre": (features,)}:
        raise ValueError(
            f"Expected keys of shape {(pool_size, features)} and their centre in "
            f"{path}, got {shapes}: make them for this backbone and pool_size."
        )
    return Keys(found["keys"].float(), found["centre"].float())
