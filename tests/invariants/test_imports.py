"""A room imports only rooms below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "lte"
FLOORS = [
    "quiet",
    "errors",
    "memory",
    "files",
    "versions",
    "ops",
    "nn",
    "rounding",
    "margins",
    "grouping",
    "families",
    "config",
    "accounting",
    "activations",
    "thresholds",
    "sparsify",
    "planes",
    "quantization",
    "tuning",
    "gguf",
    "hub",
    "inference",
    "methods",
    "training",
    "tasks",
    "evaluate",
    "lm_eval",
    "bench",
    "generate",
    "recipe",
    "run_folder",
    "runs",
    "quantize_run",
    "study",
    "models",
    "inspect",
    "report",
    "compare",
    "quickstart",
    "options",
    "terminal",
    "bench_commands",
    "evaluate_commands",
    "quantize_commands",
    "study_commands",
    "cli",
]
"""Ground floor first. ``lte/__init__.py`` is the front door and may import all."""

FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lte":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lte.")}
    return found


def test_every_room_has_a_floor():
    assert {room(path.relative_to(SOURCE).parts) for path in FILES} <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    own = FLOORS.index(room(path.relative_to(SOURCE).parts))
    above = {name for name in imported_rooms(path) if FLOORS.index(name) > own}
    assert not above, f"{path.name} imports {above}, which are above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_exception_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            assert not all(isinstance(part, ast.Pass) for part in node.body), f"{path}:{node.lineno}: swallowed"


def test_files_stay_readable():
    assert not [str(path) for path in FILES if len(path.read_text().splitlines()) > 500]


def test_only_torch_below_the_model_rooms():
    for name in ("ops", "nn"):
        for path in (SOURCE / name).rglob("*.py"):
            assert "transformers" not in path.read_text().replace("transformers' ", ""), path
