"""Arrows point one way, and heavy packages stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILIES = {"peft", "privacy", "compression", "aggregation"}
CORE = {
    "errors",
    "tensors",
    "seeds",
    "config",
    "sections",
    "interfaces",
    "durable",
    "assets",
    "wording",
    "passes",
    "sizes",
}
# Who may import whom inside the library; a room may always import itself and the core.
ALLOWED = {
    **{name: set() for name in CORE | FAMILIES},
    "data": set(),
    "keys": set(),
    "oracle": set(),
    "report": set(),
    "scenarios": set(),
    "sharing": set(),
    "backbone": set(),
    "tasks": {"backbone", "data"},
    "model": {"backbone", "peft", "sharing", "tasks"},
    "features": {"model", "data"},
    "training": {"model", "data", "features"},
    "evaluation": {"model", "data", "features"},
    "doctor": {"backbone", "oracle", "peft", "privacy"},
    "export": {"backbone", "model", "peft", "tasks"},
    "menus": {"aggregation", "compression", "data", "peft"},
    "planner": {"privacy"},
    "search": {"peft"},
    "forecast": {"planner", "privacy"},
    "attacks": {"data", "model", "tasks"},
    "audit": {"attacks", "backbone", "compression", "data", "keys", "model"}
    | {"privacy", "tasks", "training"},
    "cli": {"doctor", "forecast", "keys", "menus", "planner", "privacy", "report"}
    | {"attacks", "audit", "export", "scenarios", "search"},
}
HEAVY = {
    "flwr": {"client", "server", "simulations"},
    "grpc": {"client", "server", "simulations"},
    "opacus": {"privacy"},
    "dp_accounting": {"privacy"},
    "transformers": {"assets", "backbone", "data", "peft", "doctor", "export"},
    "peft": {"peft"},
    "constriction": {"compression"},
}
TOP = {"client": {"client"}, "server": {"server", "client"}, "fedpeft": set()}
FILES = [
    path
    for package in ("fedpeft", "client", "server", "simulations")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    room = rest[0] if package == "fedpeft" else package
    for name in _imports(path):
        head, *tail = name.split(".")
        if head in HEAVY and "benchmarks" not in rest:  # which measure other libraries
            assert room in HEAVY[head], f"{path} may not import {head}"
        if head == "fedpeft" and package == "fedpeft" and tail and room != "__init__":
            inside = ROOT / "fedpeft" / tail[0]
            if inside.is_dir() or inside.with_suffix(".py").exists():
                reach = ALLOWED[room] | CORE | {room}
                assert tail[0] in reach, f"{path} may not import fedpeft.{tail[0]}"
        if head in {"client", "server", "simulations"} and room != "cli":
            assert package == "simulations" or head in TOP[package], f"{path}: {name}"


def test_the_core_does_not_import_upwards() -> None:
    order = ["errors", "tensors", "interfaces"]
    for position, room in enumerate(order):
        names = _imports(ROOT / "fedpeft" / f"{room}.py")
        later = {f"fedpeft.{name}" for name in order[position + 1 :]}
        assert not {name for name in names if ".".join(name.split(".")[:2]) in later}
