"""What all tests share: one thread, no hub, a fixed hypothesis profile, real assets."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

import client as client  # before anything imports gRPC, which reads its setting once
from fedpeft import assets
from fedpeft.data.rotten_tomatoes import load as rotten_tomatoes_examples

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(0)
    return generator


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real MiniLM; the first use downloads 84 MB."""
    return assets.pull("minilm")


@pytest.fixture(scope="session")
def rotten_tomatoes() -> Path:
    """The file of the real reviews; the first use downloads 9 MB."""
    return assets.pull("rotten-tomatoes")


@pytest.fixture(scope="session")
def vit_s() -> Path:
    """The folder of the real ViT-S/14; the first use downloads 90 MB."""
    return assets.pull("vit-s")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2-135M; the first use downloads 93 MB."""
    return assets.pull("smollm2")


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder of the real Fashion-MNIST; the first use downloads 31 MB."""
    return assets.pull("fashion-mnist")


@pytest.fixture(scope="session")
def mnist() -> Path:
    """The file of 5,000 real digits; the first use downloads 1 MB."""
    return assets.pull("mnist")


@pytest.fixture(scope="session")
def emoji() -> list[Path]:
    """The folders of both vendors' emoji; the first use downloads 136 MB."""
    return [assets.pull(name) for name in assets.needed_by("emoji")]


@pytest.fixture(scope="session")
def small_reviews(
    minilm: Path, rotten_tomatoes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A csv of 240 real reviews of 24 films, ten each: a user's own file."""
    examples = rotten_tomatoes_examples()
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    films: dict[str, int] = {}
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "verdict", "film"])
        for text, label, film in zip(
            examples.contents, examples.labels.tolist(), examples.groups, strict=True
        ):
            seen = films.get(film, 0)
            if seen < 10 and (film in films or len(films) < 24):
                films[film] = seen + 1
                rows.writerow([text, examples.label_names[label], film])
    return path
