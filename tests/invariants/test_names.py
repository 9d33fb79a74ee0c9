"""One name for one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import lte
from lte.recipe import Recipe

SOURCE = Path(__file__).parents[2] / "src" / "lte"
ALIKE = {
    "Case": "what one line of a bench measures",
    "Copy": "of an FFN, and how C++ sees it",
    "Engine": "what runs a model in a bench",
    "Row": "of a table",
    "main": "of a program",
    "obstacle": "why something cannot run here",
    "quantize": "a matrix, a model",
    "remember": "what was measured or chosen",
}
"""Names that mean the same in more than one room."""


def of_what(path: Path) -> str:
    """The room that a definition counts for; commands and backends have the names of what they run."""
    inside = path.relative_to(SOURCE)
    if inside.name == "cli.py" or inside.name.endswith("_commands.py"):
        return "commands"
    return "backends" if inside.parts[0] == "ops" and inside.name != "weights.py" else str(inside)


def test_no_two_things_have_one_name():
    rooms = defaultdict(set)
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                rooms[node.name].add(of_what(path))
    shared = {name: found - {"commands"} for name, found in rooms.items() if len(found - {"commands"}) > 1}
    assert {name: found for name, found in shared.items() if name not in ALIKE} == {}


def test_what_once_had_two_names_has_one():
    model_words = {"calibrate", "set_sparsity", "quantize", "sparsify"}
    assert model_words <= set(lte.__all__)
    assert not [name for name in lte.__all__ if name.startswith("calibrat") and name != "calibrate"]
    defined = [
        node.name
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert defined.count("set_sparsity") == 1
    assert [name for name in defined if name.strip("_").endswith("Plan")] == ["StagePlan"]
    assert "recipe" not in Recipe.model_fields
