"""What all tests share: one thread, no hub, a fixed hypothesis profile, real assets."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

from fedpeft import assets

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
