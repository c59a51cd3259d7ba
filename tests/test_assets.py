"""The cache: pulls of tiny wheels through the real pip, from a folder, no index."""

import base64
import dataclasses
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft import assets
from fedpeft.assets import Asset
from fedpeft.data import DATASETS
from fedpeft.errors import AssetError

Assets = dict[str, Asset]

CONTENT = {
    "tiny_asset/data/a.txt": b"alpha",
    "tiny_asset/data/deep/b.txt": b"beta",
    "tiny_asset/unused.txt": b"unused",
    "tiny_asset/zeros.bin": bytes(2_000_000),  # large unpacked, tiny in the wheel
    "../outside.txt": b"evil",
}


def write_wheel(folder: Path, content: dict[str, bytes]) -> Path:
    """Builds ``tiny-asset==1.0``."""
    info = "tiny_asset-1.0.dist-info"
    files = {
        **content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
            b"Tag: py3-none-any\n"
        ),
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
        record += f"{name},sha256={digest.decode()},{len(data)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir()
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows no index and no settings."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """An asset in a wheel that pip finds in a local folder."""
    wheel = write_wheel(tmp_path / "wheels", CONTENT)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    data = wheel.read_bytes()
    return Asset(
        name="tiny",
        kind="data",
        source="pypi",
        package="tiny-asset",
        version="1.0",
        archive=wheel.name,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        licence="none",
        members=("tiny_asset/data/",),
        path="tiny_asset/data/a.txt",
    )


def pull(asset: Asset, progress: assets.Progress | None = None) -> Path:
    return assets.pull(asset.name, progress, assets={asset.name: asset})


def fail(asset: Asset) -> str:
    """Pulls in vain and returns the message, which is one line."""
    with pytest.raises(AssetError) as caught:
        pull(asset)
    message = str(caught.value)
    assert "\n" not in message
    return message


def in_new_process(
    asset: Asset, *, python: str = sys.executable, before: str = ""
) -> "subprocess.Popen[str]":
    """Starts a pull in another process; it prints the path or the error's one line."""
    script = (
        f"{before}\nimport json, signal, sys\n"
        # Where the tests run in the background, SIGINT is ignored, and inherited so.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fedpeft import assets\n"
        "from fedpeft.errors import AssetError\n"
        "entry = json.loads(sys.argv[1])\n"
        "asset = assets.Asset(**{**entry, 'members': tuple(entry['members'])})\n"
        "try:\n    print(assets.pull(asset.name, assets={asset.name: asset}))\n"
        "except AssetError as error:\n    print('error:', error)\n"
    )
    root = Path(assets.__file__).parents[2]
    return subprocess.Popen(
        [python, "-c", script, json.dumps(dataclasses.asdict(asset))],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_shipped_catalogue_is_complete_and_consistent() -> None:
    catalogue = assets.catalogue()
    assert {name for name in catalogue if catalogue[name].kind == "model"} == {
        "minilm",
        "vit-s",
        "smollm2",
    }
    starts = {"pypi": "{}-{}-", "debian": "{}_{}_", "npm": "{}-{}."}
    for name, asset in catalogue.items():
        assert asset.name == name
        assert asset.kind in ("model", "data")
        assert len(bytes.fromhex(asset.sha256)) == 32
        is_wheel = asset.source == "pypi"
        package = asset.package.replace("-", "_") if is_wheel else asset.package
        start = starts[asset.source].format(package, asset.version)
        assert asset.archive.startswith(start)
        assert any(kept.startswith(asset.path) for kept in asset.kept)


def test_every_data_set_is_made_of_assets() -> None:
    for name in DATASETS:
        assert assets.needed_by(name) != []


def test_pull_unpacks_the_members_and_nothing_else(cache: Path, tiny: Asset) -> None:
    path = pull(tiny)
    assert path == assets.locate("tiny", assets={"tiny": tiny})
    assert path.read_bytes() == b"alpha"
    found = [str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()]
    assert sorted(found) == [
        "tiny-1.0/archive.sha256",
        "tiny-1.0/tiny_asset/data/a.txt",
        "tiny-1.0/tiny_asset/data/deep/b.txt",
    ]


def test_second_pull_needs_no_index(
    tiny: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pull(tiny)
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert pull(tiny) == path


def test_progress_rises_to_the_size_of_the_archive(tiny: Asset) -> None:
    seen: list[tuple[int, int]] = []
    pull(tiny, lambda done, total: seen.append((done, total)))
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == tiny.size_bytes
    assert {total for _, total in seen} == {tiny.size_bytes}


def test_a_member_never_lands_outside_the_cache(cache: Path, tiny: Asset) -> None:
    message = fail(dataclasses.replace(tiny, members=("../",)))
    assert "it would leave the cache" in message
    assert list(cache.parent.rglob("outside.txt")) == []


def test_a_file_named_pip_in_the_working_directory_is_not_run(
    tmp_path: Path, tiny: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert pull(tiny).exists()


def test_three_processes_pull_at_once(cache: Path, tiny: Asset) -> None:
    processes = [in_new_process(tiny) for _ in range(3)]
    lines = {process.communicate()[0].strip() for process in processes}
    assert lines == {str(cache / "tiny-1.0/tiny_asset/data/a.txt")}
    assert [path.name for path in cache.iterdir()] == ["tiny-1.0"]


def lose_a_member(folder: Path) -> None:
    (folder / "tiny_asset/data/a.txt").unlink()
    (folder / "tiny_asset/data/deep/b.txt").unlink()
    (folder / "tiny_asset/data/deep").rmdir()
    (folder / "tiny_asset/data").rmdir()


def lose_the_marker(folder: Path) -> None:
    (folder / "archive.sha256").unlink()


def mark_another_archive(folder: Path) -> None:
    (folder / "archive.sha256").write_text("0" * 64)


@pytest.mark.parametrize(
    "damage", [lose_a_member, lose_the_marker, mark_another_archive]
)
def test_a_half_or_older_pull_is_not_present_and_is_replaced(
    cache: Path, tiny: Asset, damage: Callable[[Path], None]
) -> None:
    pull(tiny)
    damage(cache / "tiny-1.0")
    assert not assets.is_present(tiny)
    with pytest.raises(AssetError, match=r"run `fedpeft assets pull tiny`\.$"):
        assets.locate("tiny", assets={"tiny": tiny})
    assert pull(tiny).read_bytes() == b"alpha"
    assert [path.name for path in cache.iterdir()] == ["tiny-1.0"]


def test_unknown_name_lists_the_known_ones() -> None:
    for function in (assets.locate, assets.pull):
        with pytest.raises(AssetError, match=r"minilm, vit-s, smollm2, .*, got 'bert'"):
            function("bert")


def test_wrong_hash_is_refused_and_leaves_nothing(cache: Path, tiny: Asset) -> None:
    message = fail(dataclasses.replace(tiny, sha256="0" * 64))
    assert message.startswith(f"Expected sha256 {'0' * 64}")
    assert tiny.sha256 in message
    assert list(cache.iterdir()) == []


def test_another_archive_than_the_pinned_one_is_named(cache: Path, tiny: Asset) -> None:
    pinned = "tiny_asset-1.0-cp311-none-any.whl"
    message = fail(dataclasses.replace(tiny, archive=pinned))
    assert f"Expected the archive {pinned}, got {tiny.archive}" in message
    assert list(cache.iterdir()) == []


def test_missing_member_is_named(cache: Path, tiny: Asset) -> None:
    message = fail(dataclasses.replace(tiny, members=("tiny_asset/c.txt",)))
    assert "Expected tiny_asset/c.txt" in message
    assert list(cache.iterdir()) == []


def test_no_index_is_one_sentence(
    cache: Path, tiny: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fail(tiny) == (
        "Expected pip to fetch tiny-asset==1.0, but no package index within its reach "
        "has it; check the connection and pip's settings, then run "
        "`fedpeft assets pull tiny`."
    )
    assert list(cache.iterdir()) == []


def test_refused_connection_reads_like_no_index(
    cache: Path, tiny: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "no package index within its reach has it" in fail(tiny)
    assert list(cache.iterdir()) == []


def test_other_complaints_of_pip_are_quoted(
    cache: Path, tiny: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONSTRAINT", "/nowhere/constraints.txt")
    assert "/nowhere/constraints.txt" in fail(tiny)
    assert list(cache.iterdir()) == []


def test_python_without_pip_is_told_so(
    cache: Path, tmp_path: Path, tiny: Asset
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    output, _ = in_new_process(
        tiny, python=str(tmp_path / "bare/bin/python")
    ).communicate()
    assert output.startswith("error: Expected pip to fetch tiny-asset==1.0, but this")
    assert "has no pip; install it" in output
    assert output.count("\n") == 1
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("limit", [100, 100_000])
def test_full_disk_is_one_sentence_and_leaves_nothing(
    cache: Path, tiny: Asset, limit: int
) -> None:
    """The first limit stops pip's download, the second our unpacking of zeros.bin."""
    large = dataclasses.replace(tiny, members=(*tiny.members, "tiny_asset/zeros.bin"))
    limited = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)"
    )
    output, _ = in_new_process(large, before=limited).communicate()
    assert output.startswith("error: ")
    assert "File too large" in output
    assert output.count("\n") == 1
    assert list(cache.iterdir()) == []


def test_interrupted_pull_leaves_nothing(
    cache: Path, tiny: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # accepts and never answers
        index.settimeout(60)
        monkeypatch.delenv("PIP_NO_INDEX")
        port = index.getsockname()[1]
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
        process = in_new_process(tiny)
        with index.accept()[0]:  # now pip is at work
            assert list(cache.iterdir()) != []
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate()
    assert output.endswith("KeyboardInterrupt\n")
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, tiny: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "file" / "cache"))
    message = fail(tiny)
    assert message.startswith(
        f"Cannot write 'tiny' to {tmp_path}/file/cache: Not a dir"
    )
    assert "set FEDPEFT_CACHE" in message


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("FEDPEFT_CACHE", "")
    assert assets.cache_folder() == Path("/home/ada/.cache/fedpeft")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert assets.cache_folder() == Path("/fast/fedpeft")
    monkeypatch.setenv("FEDPEFT_CACHE", "~/own")
    assert assets.cache_folder() == Path("/home/ada/own")
