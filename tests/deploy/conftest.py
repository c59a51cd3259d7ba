"""Keys and federations of real processes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedpeft import keys
from tests.deploy.federation import NAMES, Federation


@pytest.fixture(scope="session")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's pair for loopback, and one pair a client."""
    folder = tmp_path_factory.mktemp("keys")
    keys.create_ca(folder, "test")
    keys.create_server(folder, ["127.0.0.1", "localhost"])
    for name in NAMES:
        keys.create_client(folder, name)
    return folder


@pytest.fixture
def federation(
    tmp_path: Path, small_reviews: Path, key_folder: Path
) -> Iterator[Callable[..., Federation]]:
    """Makes federations of three clients; ends their processes."""
    made: list[Federation] = []

    def make(*overrides: str, **options: object) -> Federation:
        folder = tmp_path / f"federation-{len(made)}"
        folder.mkdir()
        made.append(
            Federation(folder, small_reviews, key_folder, *overrides, **options)
        )
        return made[-1]

    yield make
    for one in made:
        one.close()
