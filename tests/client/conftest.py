"""What the client's tests share: a disk that can really be full."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class SmallDisk:
    """A disk of 4 MB.

    Attributes:
        path: where it is mounted.
    """

    path: Path

    def fill(self) -> None:
        """Takes the last byte."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                while True:
                    try:
                        file.write(bytes(size))
                    except OSError:
                        break

    def free(self) -> None:
        """Gives all of it back."""
        (self.path / "filler").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes rights that are not given here")
    yield SmallDisk(disk)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
