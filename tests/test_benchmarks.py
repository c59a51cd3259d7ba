"""The benchmarks' own machinery, on models of next to no size."""

import subprocess
import sys
from dataclasses import replace

import pytest

from simulations.benchmarks import dp_step
from simulations.benchmarks.dp_step import Bench, measure
from simulations.benchmarks.measuring import forked_peak, interleaved_medians
from simulations.benchmarks.shapes import PEFT_METHODS, SHAPES, TINY_IMAGES, TINY_TEXTS
from simulations.benchmarks.steps import ENGINES, Setting, StepFn, non_private

# Opacus' hooks say so of every layer whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    # Larger than the warm-up, which takes these as they are.
    monkeypatch.setitem(SHAPES, "vit_ti", replace(TINY_IMAGES, batch=256))
    monkeypatch.setitem(SHAPES, "bert_small", replace(TINY_TEXTS, batch=256))


def test_every_engine_has_a_ratio_of_time_and_of_memory() -> None:
    places = [("vit_ti", "ssf"), ("bert_small", "ssf"), ("bert_small", "lora")]
    results = measure([Bench(*place, "cpu", "fp32") for place in places], rounds=1)
    assert {shape: list(methods) for shape, methods in results.items()} == {
        "vit_ti": ["ssf"],
        "bert_small": ["ssf", "lora"],
    }
    for methods in results.values():
        for engines in methods.values():
            assert list(engines) == ["ours", "hooks", "ghost", "functorch"]
            for ratios in engines.values():
                assert list(ratios) == ["time", "memory"]
                assert min(ratios.values()) > 0


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_every_engine_equals_the_loop_on_every_method(method: str) -> None:
    Bench("bert_small", method, "cpu", "fp32").check(ENGINES)


def test_an_engine_that_fails_is_null_and_says_why(monkeypatch, capsys) -> None:
    def refuse(case, setting: Setting) -> StepFn:
        raise ValueError("not this one")

    monkeypatch.setitem(dp_step._WAYS, "ghost", refuse)
    results = measure([Bench("bert_small", "ssf", "cpu", "fp32")], rounds=1)
    assert results["bert_small"]["ssf"]["ghost"] is None
    assert results["bert_small"]["ssf"]["hooks"] is not None
    assert "bert_small ssf ghost: ValueError: not this one" in capsys.readouterr().err


def test_an_engine_with_another_gradient_is_an_error(monkeypatch) -> None:
    monkeypatch.setitem(ENGINES, "hooks", non_private)  # it clips nothing
    with pytest.raises(ValueError, match=r"hooks on bert_small ssf .* off by"):
        Bench("bert_small", "ssf", "cpu", "fp32").check(["ours", "hooks"])


def test_a_forked_peak_is_what_the_work_holds_at_once() -> None:
    # In a process of its own, as a benchmark is: this one's heap is full of holes.
    program = """
import torch
from simulations.benchmarks.measuring import forked_peak

def work():
    for _ in range(3):
        torch.ones(8 << 20)  # 32 MiB, gone before the next

print(forked_peak(work, warm_up=lambda: None))
"""
    command = [sys.executable, "-c", program]
    peak = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert 32 << 20 <= peak < 40 << 20


def test_what_a_fork_raises_is_raised_here() -> None:
    def work() -> None:
        raise ValueError("no such thing")

    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        forked_peak(work, warm_up=lambda: None)


def test_interleaved_steps_all_run_once_a_round() -> None:
    runs: list[str] = []
    steps = {name: lambda name=name: runs.append(name) for name in "abc"}

    def clock(work: StepFn) -> float:
        work()
        return float(len(runs))

    medians = interleaved_medians(steps, 5, clock)
    assert all(sorted(runs[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))
    assert medians.keys() == steps.keys()
    assert len({tuple(runs[i : i + 3]) for i in range(0, 15, 3)}) > 1
