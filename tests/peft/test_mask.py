"""Masks: what they add, from which public scores, and what they refuse."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpeft.peft import Mask, _pinned
from fedpeft.peft.mask import Masked
from fedpeft.peft.scores import (
    fisher_scores,
    highest,
    sensitivity_scores,
    write_scores,
)
from tests.helpers import tiny_bert, toy_inputs

QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(autouse=True)
def _own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_a_mask_adds_its_values_at_its_places() -> None:
    base = nn.Linear(3, 2).requires_grad_(False)
    before = base.weight.clone()
    layer = Masked(base, torch.tensor([1, 5]))
    nn.init.constant_(layer.values, 10.0)
    expected = torch.tensor([[0.0, 10.0, 0.0], [0.0, 0.0, 10.0]])
    assert torch.equal(layer.weight, before + expected)
    assert torch.equal(base.weight, before)


def test_a_random_mask_follows_the_seed() -> None:
    places = []
    for seed in (1, 1, 2):
        backbone = tiny_bert()
        torch.manual_seed(seed)
        Mask(density=0.1).attach(backbone)
        places.append(backbone.get_submodule(QUERY).places)
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[1], places[2])
    assert len(places[0].unique()) == round(0.1 * 32 * 32)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_the_highest_are_exactly_as_many_as_asked(values, data) -> None:
    count = data.draw(st.integers(1, len(values)))
    chosen = highest(torch.tensor(values).float(), count)
    assert int(chosen.sum()) == count
    kept = sorted((v for v, c in zip(values, chosen, strict=True) if c), reverse=True)
    assert kept == sorted(values, reverse=True)[:count]


def _losses(backbone: nn.Module):
    return lambda ids: backbone(input_ids=ids).last_hidden_state.mean((1, 2))


def _linear_losses(layer: nn.Linear):
    return lambda x: layer(x).sum(1)


def test_scores_of_a_linear_layer_are_squares_of_its_inputs() -> None:
    layer = nn.Linear(2, 1)
    backbone = nn.Sequential(layer).requires_grad_(False)
    batches = [torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    scores = fisher_scores(backbone, batches, _linear_losses(layer))
    assert scores["0.weight"].tolist() == [[1 + 9, 4 + 1]]
    scores = sensitivity_scores(backbone, batches, _linear_losses(layer))
    assert scores["0.weight"].tolist() == [[2.0**2, 1 + 1]]
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("source", ["fish", "spt"])
def test_a_mask_takes_the_highest_public_scores(source, tmp_path: Path) -> None:
    backbone = tiny_bert()
    make = fisher_scores if source == "fish" else sensitivity_scores
    scores = make(backbone, [toy_inputs("bert", 4)["input_ids"]], _losses(backbone))
    path = tmp_path / "scores.safetensors"
    sha256 = write_scores(scores, path)
    method = Mask(density=0.02, source=source, public=str(path), sha256=sha256)
    method.attach(backbone)
    flat = torch.cat([score.flatten() for score in scores.values()])
    masks = {n: m for n, m in backbone.named_modules() if isinstance(m, Masked)}
    chosen = torch.cat(
        [scores[f"{n}.weight"].flatten()[m.places] for n, m in masks.items()]
    )
    count = round(0.02 * len(flat))
    assert torch.equal(chosen.sort().values, flat.sort().values[-count:])
    assert len(masks) < len(scores)  # some layers have none of the highest


def test_another_score_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"

    def attach(content: bytes | dict, sha256: str = "") -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
        else:
            digest = write_scores(content, path)
        Mask(source="fish", public=str(path), sha256=sha256 or digest).attach(
            tiny_bert()
        )

    whole = {
        f"{n}.weight": torch.ones_like(m.weight)
        for n, m in tiny_bert().named_modules()
        if isinstance(m, nn.Linear)
    }
    attach(whole)
    with pytest.raises(ValueError, match=r"with sha256 00, got .* the same file"):
        attach(whole, "00")
    with pytest.raises(ValueError, match="Expected a safetensors file"):
        attach(b"other")
    name = f"{QUERY}.weight"
    with pytest.raises(ValueError, match=rf"\(32, 32\) for {name}.*got \(2, 2\)"):
        attach(whole | {name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=rf"for {name}.*got none"):
        attach({n: t for n, t in whole.items() if n != name})
    with pytest.raises(ValueError, match=f"finite scores for {name}"):
        attach(whole | {name: torch.full((32, 32), torch.nan)})
    path.unlink()
    with pytest.raises(ValueError, match="No such file or directory: copy it there"):
        Mask(source="fish", public=str(path), sha256="00").attach(tiny_bert())


@pytest.mark.parametrize("source", ["fish", "spt"])
@pytest.mark.parametrize("given", [{}, {"public": "x"}, {"sha256": "00"}])
def test_scores_of_private_data_are_refused(source, given) -> None:
    with pytest.raises(ValueError, match=r"shows the scores to all.*private data"):
        Mask(source=source, **given)


def test_a_mask_needs_linear_layers() -> None:
    with pytest.raises(ValueError, match="with linear layers"):
        Mask().attach(nn.Embedding(3, 2))


def test_a_mask_too_full_for_the_peft_library_is_refused() -> None:
    backbone = tiny_bert()
    method = Mask(density=1.0)
    method.attach(backbone)
    with pytest.raises(ValueError, match=r"at most 1024 entries .* export it merged"):
        method.to_peft(backbone)


def test_only_a_regular_file_of_some_size_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # whose reader would wait for ever
    with pytest.raises(ValueError, match=r"public scores .*pipe, got no regular file"):
        Mask(source="fish", public=str(pipe), sha256="00").attach(tiny_bert())
    monkeypatch.setattr(_pinned, "MAX_BYTES", 3)
    large = tmp_path / "large"
    large.write_bytes(b"four")
    with pytest.raises(ValueError, match="with at most 3 bytes, got 4: correct"):
        Mask(source="fish", public=str(large), sha256="00").attach(tiny_bert())
