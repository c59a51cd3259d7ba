"""Where a backbone is read from, and what its fingerprint covers."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from fedpeft.backbone import Backbone, load_backbone
from fedpeft.errors import ConfigError
from fedpeft.tensors import fingerprint
from tests.finished import tiny_directory

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
IMAGES = "image-classification"


def _with_settings(folder: Path, minilm: Path, text: str) -> Backbone:
    tiny_directory(folder, "vit", minilm)
    (folder / "preprocessor_config.json").write_text(text)
    return load_backbone(str(folder), IMAGES)


def test_an_image_models_folder_says_how_pixels_are_normalised(
    tmp_path: Path, minilm: Path
) -> None:
    found = _with_settings(tmp_path / "a", minilm, json.dumps(HALF))
    assert (found.channels_mean, found.channels_deviation) == (3 * (0.5,), 3 * (0.25,))
    other = _with_settings(tmp_path / "b", minilm, "{}")
    assert other.channels_mean == Backbone.channels_mean
    assert found.fingerprint != other.fingerprint
    again = _with_settings(tmp_path / "c", minilm, json.dumps(HALF))
    assert again.fingerprint == found.fingerprint


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"image_mean": null, "image_std": null}',
        '{"image_mean": [0.5, 0.5], "image_std": [1, 1, 1]}',
        '{"image_mean": [0.5, 0.5, NaN], "image_std": [1, 1, 1]}',
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 0]}',
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, [1]]}',
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1%s]}' % (400 * "0"),
    ],
)
def test_settings_that_cannot_be_are_imagenets(
    text: str, tmp_path: Path, minilm: Path
) -> None:
    found = _with_settings(tmp_path / "a", minilm, text)
    assert found.channels_mean == Backbone.channels_mean
    assert found.channels_deviation == Backbone.channels_deviation


def test_a_text_models_fingerprint_is_that_of_its_tensors(minilm: Path) -> None:
    found = load_backbone(str(minilm))
    assert found.fingerprint == fingerprint(found.module.state_dict().items())


def test_a_name_of_the_hub_is_never_a_folder_here(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache" / "models--org--tiny"
    _with_settings(cached / "snapshots" / commit, minilm, json.dumps(HALF))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert load_backbone("hub:org/tiny", IMAGES).channels_mean == (0.5, 0.5, 0.5)
    os.makedirs("org/tiny")
    with pytest.raises(ConfigError, match="which is a file or folder here, too"):
        load_backbone("hub:org/tiny", IMAGES)


def test_weights_that_no_checkpoint_holds_are_refused(minilm: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"all weights .* got none for cls\."
    ) as caught:
        load_backbone("minilm", "causal-lm")
    assert "\n" not in str(caught.value)
