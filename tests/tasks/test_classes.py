"""One label or several: losses and metrics that one can do by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from fedpeft.data import check_classes, load
from fedpeft.errors import DataError
from fedpeft.sections import DataSection
from fedpeft.tasks.classes import class_losses, class_metrics, main_metric


def test_several_labels_give_the_mean_of_their_binary_losses() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), -math.log(3)]])
    losses = class_losses(logits, torch.tensor([[1, 0], [1, 0]]))
    # A logit of 0 costs log 2; one of log 3 on the right side log 4/3.
    expected = torch.tensor([math.log(2), math.log(4 / 3)])
    assert torch.allclose(losses, expected)


def test_macro_f1_counts_every_class_alike() -> None:
    logits = torch.eye(3)[[0, 0, 0, 1]]
    metrics = class_metrics(logits, torch.tensor([0, 0, 1, 2]))
    # Class 0: 2 hits of 3 found and 2 wanted, 4/5; classes 1 and 2: none.
    assert metrics["macro_f1"] == pytest.approx(0.8 / 3)
    assert metrics["accuracy"] == 0.5


def test_all_labels_of_an_example_must_be_right() -> None:
    logits = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    metrics = class_metrics(logits, torch.tensor([[1, 1], [1, 1]]))
    assert metrics == {"accuracy": 0.5, "macro_f1": pytest.approx((1 + 2 / 3) / 2)}


def write(folder: Path, rows: list[dict[str, object]], ending: str) -> Path:
    path = folder / f"notes{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [f'"{row["text"]}","{row["label"]}"' for row in rows]
        path.write_text("\n".join(("text,label", *lines)))
    return path


@pytest.mark.parametrize(
    ("ending", "cells"),
    [(".csv", ("b; a", "", "c")), (".jsonl", (["b", "a"], [], "c"))],
)
def test_several_labels_are_read(
    tmp_path: Path, ending: str, cells: tuple[object, ...]
) -> None:
    rows = [{"text": "t", "label": cell} for cell in cells]
    path = write(tmp_path, rows, ending)
    section = DataSection(path=str(path), labels=("a", "b", "c"), multi_label=True)
    examples = load(section)
    assert examples.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert examples.is_multi_label
    assert main_metric(section) == "macro_f1"


def test_an_undeclared_label_among_several_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "t", "label": "a;x"}], ".csv")
    section = DataSection(path=str(path), labels=("a", "b"), multi_label=True)
    with pytest.raises(DataError, match="line 2: expected a label among 'a', 'b', got"):
        load(section)


def test_data_of_one_class_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "t", "label": "a"}] * 3, ".csv")
    examples = load(DataSection(path=str(path), labels=("a", "b")))
    with pytest.raises(DataError, match="two classes, all 3 are 'a'"):
        check_classes(examples)


def test_instructions_are_read_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"ask": "Hello?", "answer": "Yes."}\n')
    section = DataSection(path=str(path), prompt="ask", completion="answer")
    examples = load(section)
    assert (examples.contents[0].prompt, examples.contents[0].completion) == (
        "Hello?",
        "Yes.",
    )
    assert examples.label_names == ("",)
    with pytest.raises(DataError, match="expected a column 'reply', got none"):
        load(section.model_copy(update={"completion": "reply"}))


def test_no_more_examples_than_asked_for_and_always_the_same(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": "ab"[i % 2]} for i in range(20)]
    path = write(tmp_path, rows, ".csv")
    section = DataSection(path=str(path), labels=("a", "b"), max_examples=5)
    chosen = load(section).contents
    assert len(chosen) == 5
    assert chosen == load(section).contents
    assert chosen == tuple(sorted(chosen, key=int))
    other = section.model_copy(update={"split_seed": 1})
    assert load(other).contents != chosen
